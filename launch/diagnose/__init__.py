"""Cluster diagnosis: a short job that tests nodes, network, file system and GPUs."""
