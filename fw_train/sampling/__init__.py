"""Generating clips with a trained network: conditions, the sampler, and the files that come out."""
