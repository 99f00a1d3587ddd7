"""GET /v1/kv/sessions and DELETE /v1/kv/sessions/{id}."""
