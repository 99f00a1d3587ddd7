"""GET /v1/kv/state and GET /v1/kv/policies."""
