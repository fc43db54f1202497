"""From a file or a hub dataset to token ids: sources -> records -> chat -> loading, one module each (layer 4)."""
