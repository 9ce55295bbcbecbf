"""Penalties on the step of the user's own optimizer: proximal gradient, in any training loop."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from itertools import product
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from tying.errors import PenaltyError, TyingWarning
from tying.penalties.sequences import check_not_negative
from tying.train.rules import Rules, Target, resolve
from tying.train.sweep import Sweep

Every = Literal["step", "epoch"]

_FORGOTTEN = 100
"""So many steps without a single prox are no accident at the start of a run."""

_handles: weakref.WeakKeyDictionary[Optimizer, list[ProximalHandle]] = weakref.WeakKeyDictionary()


def proximal(
    optimizer: Optimizer,
    model: nn.Module,
    rules: Rules,
    *,
    every: Every | int = "step",
    steps_per_epoch: int | None = None,
    freeze_zeros: bool = False,
    asynchronous: bool = False,
) -> ProximalHandle:
    """Put penalties on the optimizer's steps: w ← prox(w; t) after them, until `handle.remove()`.

    The step size t of a parameter is the learning rate of its param group, summed over the optimizer's steps since the
    last prox: schedules and warm-up need nothing more. What does not count as a step of a parameter: one that
    `torch.amp.GradScaler` skips, and one at which the parameter is frozen or has no gradient (weight decay leaves it
    alone then, too). A parameter that is frozen at a prox is not changed; where its groups are joined with others, it
    counts in their norms. The optimizer's state is not touched.

    Applied once per epoch the result is as good as after every step, and free. Use SGD with momentum: steps scaled
    per number, as Adam's, spoil ties, and a warning says so. A copy of the optimizer has no penalties, as PyTorch
    copies no hooks: call `proximal` for it too.

    On many machines call it on every rank, with the same rules. Replicas (DDP) send nothing and stay equal bit for bit.
    Of parameters that are sharded (DTensor: `torch.distributed.fsdp.fully_shard`, tensor parallelism) only the squares
    of the groups' norms travel: one message per prox, of 8 bytes for each group; what is not finite on one rank is
    refused by all. `torch.distributed.checkpoint` saves and loads the handle as it is, for any number of ranks.

    Args:
        optimizer: The one that steps the parameters.
        model: Whose parameter names the rules use.
        rules: `{name: penalty}`, `{(name, Groups): penalty}`, or `{joined: penalty}` with what `tying.joined_groups`
            gives (or a `tying.groups.Joined` of your own; its parameters need one learning rate). Names may be patterns
            (`"features.*.weight"`, as in `fnmatch`). Without `Groups`, `Groups.inputs()`. Several `Groups` of one
            parameter apply in order.
        every: `"step"`; a number of steps; or `"epoch"`: then call `handle.epoch_end()` at the end of each epoch, or
            give `steps_per_epoch`.
        steps_per_epoch: The optimizer's steps in one epoch (`len(loader)` without gradient accumulation).
        freeze_zeros: Whether a group that is zero after a prox stays zero for good, as in the code of Zhang et al.,
            ICLR 2018.
        asynchronous: Whether penalties on norms are solved where the weights are, without waiting for the host: for
            accelerators with a queue of work. NaN or infinity in a weight is then told one prox later, or by
            `remove()`; until then no weight of that device is changed. Not together with `freeze_zeros`.

    Returns:
        The handle that applies, saves and removes the penalties.

    Raises:
        PenaltyError: Names the rule or the parameter that can't be followed. Nothing has changed then.

    Example:
        >>> from tying.penalties import GrOWL
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> handle = proximal(optimizer, model, {"weight": GrOWL(4e-3)}, every="epoch")
        >>> for epoch in range(2):
        ...     for x in torch.ones(3, 1, 4):
        ...         optimizer.zero_grad()
        ...         model(x).sum().backward()
        ...         optimizer.step()
        ...     handle.epoch_end()
        >>> handle.remove()
    """
    period = _period(every, steps_per_epoch)
    if asynchronous and freeze_zeros:
        raise PenaltyError(
            "asynchronous: expected it without freeze_zeros, got both; which groups are zero is known to who waits: "
            "leave one of them out"
        )
    targets = resolve(rules, model, optimizer)
    for other in _handles.get(optimizer, []):
        other.refuse_overlap(targets)
    for target in targets:
        _rate(target, optimizer)
    _warn_if_adaptive(optimizer)
    sweep = Sweep(targets, tell_zeros=freeze_zeros, asynchronous=asynchronous)
    return ProximalHandle(optimizer, sweep, period, freeze_zeros)


class ProximalHandle:
    """The penalties that `proximal` put on an optimizer's steps."""

    def __init__(self, optimizer: Optimizer, sweep: Sweep, period: int | None, freeze_zeros: bool) -> None:
        targets = sweep.targets
        self._targets, self._sweep, self._period = targets, sweep, period
        self._steps = 0  # since the last prox
        self._pending = dict.fromkeys((target.key for target in targets), 0.0)
        self._dead = {target.key: torch.zeros(target.count, dtype=torch.bool) for target in targets if freeze_zeros}
        self._never_stepped = set(self._pending)
        self._removed = False
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self._count = {"steps": 0, "proxes": 0}
        self._forgotten = weakref.finalize(optimizer, _warn_if_forgotten, self._count)
        _handles.setdefault(optimizer, []).append(self)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters under a penalty, in the order in which they are computed."""
        return tuple(dict.fromkeys(place.name for target in self._targets for place in target.places))

    def prox_(self) -> None:
        """Apply the penalties now, with the learning rates summed since the last time; for hand-written loops.

        All results are computed and checked before the first is written.

        Raises:
            PenaltyError: Names the parameter that has NaN or infinity in it; no weight has changed then.
        """
        zeros = self._sweep.step_(self._pending)
        self._dead |= {key: zero for key, zero in zeros.items() if key in self._dead}
        self._pending = dict.fromkeys(self._pending, 0.0)
        self._count["proxes"] += 1
        self._steps = 0

    def epoch_end(self) -> None:
        """Say that an epoch has ended: applies the penalties if they are due once per epoch, else does nothing.

        Warns:
            TyingWarning: If the optimizer has not stepped since the last epoch's end.
        """
        if self._period is not None:
            return
        if not self._steps:
            _warn(
                "epoch_end(): expected steps of the optimizer since the last epoch, got none; "
                "give proximal() the optimizer that the loop steps, and call epoch_end() once per epoch"
            )
        self.prox_()

    def remove(self) -> None:
        """Take the penalties off the optimizer; the weights stay as they are. A second call does nothing.

        Warns:
            TyingWarning: If steps were taken since the last prox (`prox_()`, before or after, applies them), or if a
                parameter never had a gradient.

        Raises:
            PenaltyError: If the penalties are asynchronous and the last prox met NaN or infinity.
        """
        if self._removed:
            return
        self._removed = True
        self._hook.remove()
        self._forgotten.detach()
        for handles in _handles.values():
            if self in handles:
                handles.remove(self)
        if self._steps:
            remedy = "epoch_end()" if self._period is None else "prox_()"
            _warn(
                f"remove(): expected no step since the last prox, got {self._steps}; "
                f"call handle.{remedy} when training ends, or the penalties miss those steps"
            )
        if self._count["steps"] and self._never_stepped:
            _warn(
                f"{', '.join(sorted(self._never_stepped))}: expected a gradient at the optimizer's steps, got none, so "
                "the penalty was never applied; clear gradients after step() returns, not in a hook, and check that "
                "the loss depends on it"
            )
        self._sweep.settle(self._pending)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside model and optimizer: numbers, strings, and bool tensors `(G,)`."""
        return {
            "steps": self._steps,
            "pending": dict(self._pending),
            "dead": {key: dead.clone() for key, dead in self._dead.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where the handle that gave `state_dict` stopped.

        Raises:
            PenaltyError: If that handle had other parameters, or the state is malformed; nothing has changed then.
        """
        try:
            steps = int(check_not_negative("steps", state["steps"]))
            pending = {key: check_not_negative(key, value) for key, value in state["pending"].items()}
            dead = {key: torch.as_tensor(value, dtype=torch.bool).clone() for key, value in state["dead"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PenaltyError(
                f"state: expected what state_dict() returned, got something else ({error}); save it again"
            ) from error
        sizes = {target.key: target.count for target in self._targets}
        fits = (pending.keys(), dead.keys()) == (sizes.keys(), self._dead.keys()) and all(
            value.shape == (sizes[key],) for key, value in dead.items()
        )
        if not fits:
            raise PenaltyError(
                f"state: expected that of a handle on {', '.join(sizes)}, got one on {', '.join(pending)}; "
                "call proximal() with the rules, and the model, of the saved run"
            )
        self._steps, self._pending, self._dead = steps, pending, dead

    def refuse_overlap(self, targets: list[Target]) -> None:
        """Raise `PenaltyError` if one of the targets is under this handle's penalties already."""
        for target, mine in product(targets, self._targets):
            if target.overlaps(mine):
                raise PenaltyError(
                    f"{target.name}: expected a parameter without a penalty on its {target.kind}, got one that "
                    "an earlier proximal() penalises; call remove() on its handle first"
                )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        skipped = getattr(optimizer, "found_inf", None)  # set by GradScaler on optimizers that skip by themselves
        if skipped is not None and float(skipped) > 0:
            return
        self._steps += 1
        self._count["steps"] += 1
        rates = {target.key: _rate(target, optimizer) for target in self._targets}
        for target in self._targets:
            if any(place.parameter.requires_grad and place.parameter.grad is not None for place in target.places):
                self._never_stepped.discard(target.key)
                self._pending[target.key] += rates[target.key]
        self._sweep.bury_(self._dead)
        if self._period is not None and self._steps >= self._period:
            self.prox_()


def _rate(target: Target, optimizer: Optimizer) -> float:
    rates = {float(optimizer.param_groups[place.param_group]["lr"]) for place in target.places}
    if len(rates) > 1:
        raise PenaltyError(
            f"{target.key}: expected one learning rate for parameters whose groups are joined, got "
            f"{', '.join(map(str, sorted(rates)))}; put them in one param group, or give them rules of their own"
        )
    return rates.pop()


def _period(every: Every | int, steps_per_epoch: int | None) -> int | None:
    """Return the steps between two proxes, or None where the user's loop says when."""
    for name, value in (("every", every), ("steps_per_epoch", steps_per_epoch)):
        if isinstance(value, bool) or (isinstance(value, int) and value < 1):
            raise PenaltyError(f"{name}: expected a number of steps ≥ 1, got {value!r}; pass one")
    if steps_per_epoch is not None and (every != "epoch" or not isinstance(steps_per_epoch, int)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PenaltyError(
            f'steps_per_epoch: expected a whole number together with every="epoch", got {steps_per_epoch!r} with '
            f"every={every!r}; leave it out, or set every"
        )
    if every == "epoch":
        return steps_per_epoch
    if every == "step":
        return 1
    if not isinstance(every, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PenaltyError(f'every: expected "step", "epoch" or a number of steps, got {every!r}; pass one of them')
    return every


def _warn_if_adaptive(optimizer: Optimizer) -> None:
    scaled = {"betas", "eps", "etas"} & set(optimizer.defaults)  # Adam and its kin, RMSprop, Adagrad, Rprop, Lion …
    if not scaled and not isinstance(optimizer, LBFGS):
        return
    _warn(
        f"optimizer: expected SGD, whose step is the learning rate times the gradient, got {type(optimizer).__name__}, "
        "which rescales every number: weights with tiny gradients are inflated, so groups that should become zero or "
        "equal do not; use torch.optim.SGD(..., momentum=0.9) while penalties are on, and this one to retrain",
        stacklevel=4,
    )


def _warn_if_forgotten(count: Mapping[str, int]) -> None:
    if count["steps"] >= _FORGOTTEN and not count["proxes"]:
        _warn(
            f"proximal: expected the penalties to be applied, got {count['steps']} steps without; "
            'with every="epoch" call handle.epoch_end() after every epoch, or give steps_per_epoch'
        )


def _warn(message: str, stacklevel: int = 3) -> None:
    warnings.warn(message, TyingWarning, stacklevel=stacklevel)
