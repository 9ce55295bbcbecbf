"""Which layers read which channels, exactly: labels pushed through the exported graph."""
