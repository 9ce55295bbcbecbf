"""What is done with a plan: one stored copy, or a smaller network."""
