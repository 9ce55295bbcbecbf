"""A self-contained page with the pictures."""
