"""Training: the loop, checkpoints, evaluation and whole runs."""
