"""`r3hf credit`: token credit against known and human credit."""
