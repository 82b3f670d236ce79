"""Metrics of one case: overlap, surface distances, lesion detection, burden, calibration."""
