"""Developer tools: not installed."""
