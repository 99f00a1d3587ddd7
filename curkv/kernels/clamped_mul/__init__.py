"""The gated activation of gpt-oss's experts: a clamped SwiGLU."""
