"""Conversion of a folder of scans into a store: resumable, parallel, each case whole or not at all."""
