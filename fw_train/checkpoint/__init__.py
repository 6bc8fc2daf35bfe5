"""Resumable state: written in the background, atomic, loaded onto any number of ranks."""
