"""Models in one process: loading, logprobs, values, prefix scores, sharding and checkpoints (layer 2, no Ray)."""
