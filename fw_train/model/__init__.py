"""The network: the Wan video branch and the geometry branch beside it."""
