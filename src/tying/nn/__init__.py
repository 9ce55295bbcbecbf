"""Layers that compute with tied weights, as `torch.nn` has them."""
