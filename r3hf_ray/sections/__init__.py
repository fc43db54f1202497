"""The sections of a command's configuration: frozen groups of fields with their units and defaults (layer 0)."""
