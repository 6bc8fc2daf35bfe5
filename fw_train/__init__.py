"""Training system for FantasyWorld-style models."""

__version__ = "0.1.0"
