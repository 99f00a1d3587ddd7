"""The HTTP server: OpenAI's API over the engine client, with eviction controlled per request."""
