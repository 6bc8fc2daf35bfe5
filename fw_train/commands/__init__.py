"""The commands of `fw` that live in this package."""
