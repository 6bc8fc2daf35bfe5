"""What turns videos, captions and first frames into the tensors that the network takes."""
