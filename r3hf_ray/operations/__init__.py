"""What a person does to a run from anywhere: submit it, watch it, change it, end it."""
