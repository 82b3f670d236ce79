"""Training: components, loop, steps, validation, checkpoints, and the run's folder."""
