"""What is done with a plan: one stored copy, or a smaller network."""

from tying.enforce.compaction.compact import compact, plan_compaction
from tying.enforce.compaction.reduction import Compaction
from tying.enforce.ties.check import check, retie_
from tying.enforce.ties.tie import tie_, untie_
from tying.enforce.ties.unique import shard_groups, unique_parameters

__all__ = [
    "Compaction",
    "check",
    "compact",
    "plan_compaction",
    "retie_",
    "shard_groups",
    "tie_",
    "unique_parameters",
    "untie_",
]
