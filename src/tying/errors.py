"""The one family of errors: every message says expected and got, names the parameter, ends with the remedy."""


class TyingError(ValueError):
    """Base of every error that `tying` raises on purpose."""


class PlanError(TyingError):
    """A plan, a group or a label is malformed, or does not fit the model at hand."""


class PenaltyError(TyingError):
    """A penalty, a sequence of weights or a rule is malformed, or the weights are not finite."""


class CompactError(TyingError):
    """The compacted network can't be built, or does not compute what the original computes."""


class TieError(TyingError):
    """Weights that are tied are not, or can't be kept so."""


class FileError(TyingError):
    """A file is truncated, foreign, tampered with, or does not fit the model at hand."""


class TaskError(TyingError):
    """A task lacks what `compress` needs, or answers with something unusable."""


class TyingWarning(UserWarning):
    """Something works, but most likely not as wanted: the message says what to do instead."""
