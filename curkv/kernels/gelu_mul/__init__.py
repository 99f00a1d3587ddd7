"""The gated activation of Gemma's MLP: an approximation of GELU of one half times the other."""
