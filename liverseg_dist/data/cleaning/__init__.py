"""Cleaning of scans: each step a pure function of voxels and settings that also tells what it did."""
