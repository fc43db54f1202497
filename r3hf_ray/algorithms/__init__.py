"""The mathematics: pure functions on tensors and floats, no state, no configuration, no input or output (layer 1)."""
