"""The `torch` backend: the reference's numbers in few PyTorch operations, on any device."""
