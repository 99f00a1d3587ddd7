"""The engine: continuous batching over the paged cache, and the async client the server talks to."""
