"""What checkpoints could give: what tying one of them would save, or what several of them share."""

from tying.inspect.look import inspect
from tying.inspect.one import Findings, Inspection
from tying.inspect.several import Row, Sharing
from tying.inspect.skipped import Skipped

__all__ = ["Findings", "Inspection", "Row", "Sharing", "Skipped", "inspect"]
