"""What daily use does to tied weights: operations, a verdict on each, gradients, what the guard costs."""
