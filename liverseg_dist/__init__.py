"""Distributed training of 3D liver-tumour segmentation on CT (Medical Segmentation Decathlon, Task03_Liver)."""

__version__ = "0.1.0"
