"""What a convolution is: which input each tap reads, and the equalities and zeros it hard-wires in a dense layer."""
