"""Report pages, charts, overlays, CSV tables and TensorBoard summaries of an evaluation."""
