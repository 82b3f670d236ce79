"""The case store: its layout on disk, reading, metadata checks and verification."""
