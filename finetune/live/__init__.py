"""A page that shows a run while it trains, read from the run's folder; the training knows nothing of it."""
