"""The gated activation of the MLP: SiLU of one half times the other."""
