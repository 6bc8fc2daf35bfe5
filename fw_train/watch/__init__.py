"""What keeps a run honest while it runs: signs of life, being told to stop, spikes of the loss."""
