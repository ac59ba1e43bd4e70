"""What a format costs: tasks, perplexity and divergence, with paired statistics."""
