"""`r3hf bench`: the system against bare loops of the same work, side by side in one run on the same two cores."""
