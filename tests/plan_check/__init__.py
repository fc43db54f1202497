"""`r3hf plan` held to measurements; see `__main__`."""
