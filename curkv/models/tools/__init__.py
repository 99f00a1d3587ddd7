"""How families of models write calls of tools, and how their text is read back."""
