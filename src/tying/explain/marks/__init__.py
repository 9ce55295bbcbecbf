"""Who sees whom: marks pushed through an exported graph, operation by operation."""
