"""Files of weights: pretrained Wan, those of a stage, safetensors in one pass."""
