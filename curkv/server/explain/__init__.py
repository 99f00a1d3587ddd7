"""POST /v1/kv/explain."""
