"""Parameter tying and parameter sharing for PyTorch: smaller, faster and joint networks."""

from tying.compress import CompressResult, Task, compress, load_task
from tying.enforce.compact import compact
from tying.enforce.tie import tie_, unique_parameters, untie_
from tying.errors import TyingError, TyingWarning
from tying.find.declare import declare
from tying.find.discover import discover
from tying.groups import Groups
from tying.inspect import inspect
from tying.measure import Report, measure, sharing
from tying.penalties.norms import OWL, GroupLasso, GrOWL, Lasso, Ridge
from tying.plan import Tie, TiePlan
from tying.report import report
from tying.store import load, save
from tying.train.proximal import proximal
from tying.version import __version__

__all__ = [
    "OWL",
    "CompressResult",
    "GrOWL",
    "GroupLasso",
    "Groups",
    "Lasso",
    "Report",
    "Ridge",
    "Task",
    "Tie",
    "TiePlan",
    "TyingError",
    "TyingWarning",
    "__version__",
    "compact",
    "compress",
    "declare",
    "discover",
    "inspect",
    "load",
    "load_task",
    "measure",
    "proximal",
    "report",
    "save",
    "sharing",
    "tie_",
    "unique_parameters",
    "untie_",
]
