"""Readers and writers: NIfTI headers and voxels, data-set indexes, spacing tables."""
