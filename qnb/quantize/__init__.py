"""Where a model comes from, and its checkpoints: one per format."""
