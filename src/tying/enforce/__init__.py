"""What is done with a plan: one stored copy, or a smaller network."""

from tying.enforce.compact import compact
from tying.enforce.tie import tie_, unique_parameters, untie_

__all__ = ["compact", "tie_", "unique_parameters", "untie_"]
