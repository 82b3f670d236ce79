"""From files on disk to batches: MSD and NIfTI, cleaning, the Zarr store, the loader, augmentation."""
