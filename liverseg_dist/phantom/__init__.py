"""Synthetic abdomen CTs in the layout of Task03_Liver, for tests, the demo and benchmarks."""
