"""What a training needs before it starts: memory per rank, settings that fit it, time per step on many GPUs."""
