"""Data: shares of ranks, samples with random states of their own, batches of like lengths."""
