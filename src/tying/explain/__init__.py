"""What the sharing inside a network saves, who sees whom, and how far it is equivariant to translation."""
