"""A smaller network that computes the same: what is proven to be unneeded removed, what is tied summed first."""
