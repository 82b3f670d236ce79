"""Synthetic abdomen scans, CT and MR, for tests, the demo and benchmarks."""
