"""What is done with a plan: one stored copy, or a smaller network."""

from tying.enforce.compact import compact, plan_compaction
from tying.enforce.reduction import Compaction
from tying.enforce.tie import tie_, unique_parameters, untie_

__all__ = ["Compaction", "compact", "plan_compaction", "tie_", "unique_parameters", "untie_"]
