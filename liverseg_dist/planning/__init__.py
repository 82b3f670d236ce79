"""Estimates before a training starts: memory per rank, settings that fit, time on many GPUs."""
