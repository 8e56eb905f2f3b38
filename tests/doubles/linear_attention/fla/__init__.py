"""flash-linear-attention for a machine without a GPU: plain PyTorch under its names, right or wrong as a test asks."""
