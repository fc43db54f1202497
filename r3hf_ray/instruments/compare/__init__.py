"""`r3hf compare`: arms x seeds through the real system, one page and one table (layer 4)."""
