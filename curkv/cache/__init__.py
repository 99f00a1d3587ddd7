"""The paged, ragged KV cache and the policies that decide what it keeps."""
