"""Training programs of one process group: fine-tuning, reward modelling and PPO (layer 2, no Ray)."""
