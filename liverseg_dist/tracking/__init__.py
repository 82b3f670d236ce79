"""Output of a run: TensorBoard and JSONL writers, progress lines, tables on terminals."""
