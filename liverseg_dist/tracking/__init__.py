"""What a run tells the world: TensorBoard and JSONL writers, progress lines."""
