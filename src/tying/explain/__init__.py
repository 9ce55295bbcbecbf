"""What the sharing inside a network saves, who sees whom, and how far it is equivariant to translation."""

from tying.explain.load import load_example
from tying.explain.result import Explanation
from tying.explain.run import explain

__all__ = ["Explanation", "explain", "load_example"]
