"""From files on disk to batches: reading, audit, preprocessing, Zarr store, loading, augmentation.

Modules at this level serve several of the packages: findings, splits and the files that define
them, the preview of training samples.
"""
