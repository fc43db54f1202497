"""What people look at: records on disk, the terminal, wandb and the report (layer 4)."""
