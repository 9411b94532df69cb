"""Settings of a trainer: which were left alone, which defaults suit one GPU better, and what makes batches divide."""
