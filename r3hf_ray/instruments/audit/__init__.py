"""Know before you train: what a reward model's token rewards are worth, against preferences, known and human credit."""
