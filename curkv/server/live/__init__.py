"""GET /v1/kv/state, GET /v1/kv/policies and DELETE /v1/kv/prefixes."""
