"""Pure tensor maths: sequences, proxes, norms."""

from tying.penalties.certificate import Certificate
from tying.penalties.norms import OWL, GroupLasso, GrOWL, Lasso, Penalty, Ridge
from tying.penalties.prox import owl_dual_norm, owl_norm, prox_growl, prox_owl
from tying.penalties.sequences import Constant, Explicit, Oscar, Pld, Ramp, Spike

__all__ = [
    "OWL",
    "Certificate",
    "Constant",
    "Explicit",
    "GrOWL",
    "GroupLasso",
    "Lasso",
    "Oscar",
    "Penalty",
    "Pld",
    "Ramp",
    "Ridge",
    "Spike",
    "owl_dual_norm",
    "owl_norm",
    "prox_growl",
    "prox_owl",
]
