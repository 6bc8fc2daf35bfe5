"""Command-line tools that make, check and convert training data."""
