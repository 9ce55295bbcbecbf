"""What the sharing inside a network saves, who sees whom, and how far it is equivariant to translation."""

from tying.explain.load import load_example
from tying.explain.picture import check_place
from tying.explain.result import Explanation
from tying.explain.run import explain

__all__ = ["Explanation", "check_place", "explain", "load_example"]
