"""What a run will need, and what would stop it, before any machine is asked for."""
