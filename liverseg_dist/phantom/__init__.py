"""Synthetic abdomen CTs in the layout of Task03_Liver: the ground that tests, the demo and benchmarks stand on."""
