"""Parameter tying and parameter sharing for PyTorch: smaller, faster and joint networks."""

from tying.channels.joined import joined_groups
from tying.compress import compress
from tying.enforce.compaction.compact import compact
from tying.enforce.ties.check import check, retie_
from tying.enforce.ties.tie import tie_, untie_
from tying.enforce.ties.unique import unique_parameters
from tying.errors import TyingError, TyingWarning
from tying.explain import explain
from tying.find.declare import declare
from tying.find.discover import discover
from tying.find.match import match
from tying.groups import Groups
from tying.inspect import inspect
from tying.measure import measure
from tying.penalties.norms import OWL, GroupLasso, GrOWL, Lasso, Ridge
from tying.plan import Tie, TiePlan
from tying.report import report
from tying.store import load, save
from tying.train.proximal import proximal
from tying.train.soft import SoftTie
from tying.version import __version__

__all__ = [
    "OWL",
    "GrOWL",
    "GroupLasso",
    "Groups",
    "Lasso",
    "Ridge",
    "SoftTie",
    "Tie",
    "TiePlan",
    "TyingError",
    "TyingWarning",
    "__version__",
    "check",
    "compact",
    "compress",
    "declare",
    "discover",
    "explain",
    "inspect",
    "joined_groups",
    "load",
    "match",
    "measure",
    "proximal",
    "report",
    "retie_",
    "save",
    "tie_",
    "unique_parameters",
    "untie_",
]
