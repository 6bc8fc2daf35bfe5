"""What starts a run: launchers, environment, checks before the start."""
