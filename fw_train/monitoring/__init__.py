"""What a run writes about itself: terminal, metrics.jsonl, TensorBoard."""
