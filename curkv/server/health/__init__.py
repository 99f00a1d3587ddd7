"""GET /health, /metrics and /version."""
