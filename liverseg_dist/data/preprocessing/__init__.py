"""Cleaning, resampling and slab extraction: from a scan to the voxels a network receives."""
