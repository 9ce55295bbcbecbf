"""What is done with a plan: one stored copy, or a smaller network."""

from tying.enforce.compact import compact

__all__ = ["compact"]
