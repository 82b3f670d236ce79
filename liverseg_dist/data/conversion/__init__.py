"""Conversion of a folder of scans into a case store: resumable, parallel, each case complete or absent."""
