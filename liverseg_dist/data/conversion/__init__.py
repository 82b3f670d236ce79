"""Conversion of a folder of scans into a case store: resumable and parallel."""
