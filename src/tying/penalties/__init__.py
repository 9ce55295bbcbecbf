"""Pure tensor maths: sequences, proxes, norms."""
