"""Arrays as pictures and films."""
