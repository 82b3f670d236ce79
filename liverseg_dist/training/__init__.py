"""Training: what one step is, the loop around it, validation, checkpoints, and stopping and going on."""
