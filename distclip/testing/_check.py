"""The laws of a strategy, each run over made-up trainings."""

from __future__ import annotations

import copy
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, NoReturn, get_args

import torch
from torch import Tensor

from distclip.decide.decision import Clamp, Decision, Scale, Then
from distclip.decide.norms import Norms, combine
from distclip.strategies._base import Strategy
from distclip.testing._histories import PARAMETERS, histories, levels, norms_for
from distclip.testing._surroundings import HostReads, as_rank, random_state

LAWS = {
    "runs": "it takes the norms of any step without raising",
    "slots": "every parameter belongs to one of its groups",
    "decision": "it decides a Scale, Clamp or Then of float32 tensors [] or [num_slots], and skip bool []",
    "no host sync": "it reads no tensor's value: no .item(), no `if tensor`, no boolean index",
    "pure": "it changes nothing but its own buffers",
    "deterministic": "the same norms give the same decisions, whatever the rank, random state, other copies",
    "coefficients": "for finite norms, coefficients are numbers in [0, 1], bounds and thresholds ≥ 0",
    "left alone": "below the threshold the coefficient is exactly 1, and no step is skipped",
    "state": "buffers keep names, shapes, dtypes and devices, and finite norms bring no NaN into them",
    "no trace": "a step that is skipped, NaN or infinite leaves the state (a skipped one: all of it but "
    "``through_skips``) as if it had not been",
    "state_dict": "a new one that loads the state_dict continues the same sequence",
    "goes on": "whatever finite norms come, what it has learned multiplies no gradient by 0, and it does not "
    "skip more than `steps` of them in a row",
    "idempotent": "clipping what is already clipped changes it by rounding at most (memoryless=True)",
}
"""What is checked, by the name that :class:`LawBroken` gives."""

_FOLLOWED = 16  # steps that a loaded copy is followed for


class LawBroken(AssertionError):
    """A strategy breaks a law of :class:`distclip.Strategy`.

    Attributes:
        law: which, a key of ``distclip.testing.LAWS``.
    """

    def __init__(self, law: str, message: str) -> None:
        super().__init__(message)
        self.law = law


def check_strategy(
    strategy: Strategy | Callable[[], Strategy],
    *,
    seed: int = 0,
    steps: int = 128,
    memoryless: bool = False,
    one_threshold: bool = True,
) -> None:
    """Run the laws of :class:`distclip.Strategy` over a strategy, in one process and without gradients.

    It gets the norms of eight short trainings: usual ones, spikes of all or of one parameter, norms of 0,
    10⁻⁴⁰ and 10³⁶, NaN and ∞, each of these also as the very first. Then those of eight in which the level
    changes, by 2, 10 and 1/10, drifts, or is 0 for a time. Takes a few seconds.

    Args:
        strategy: the strategy, which is copied and stays as it is, or a function that makes a new one
            (its class, if that takes no arguments).
        seed: draws the norms.
        steps: of each training, ≥ 1. Choose more than the strategy's warm-up takes, and than it skips in a
            row.
        memoryless: the strategy keeps no state, so that clipping twice has to be clipping once.
        one_threshold: the decision's threshold is all that the strategy clips by. False for one that has
            several and reports one, as a ``Chain`` of strategies may.

    Raises:
        LawBroken: an ``AssertionError`` that names the law, and the norms that break it.
        ValueError: ``steps`` is not positive.
        TypeError: ``strategy`` is no strategy and makes none.

    Example:
        >>> check_strategy(lambda: distclip.ZClip(warmup=25))
        >>> check_strategy(distclip.GlobalNorm(1.0), memoryless=True)
    """
    if steps < 1:
        raise ValueError(f"{steps=}: expected at least one")
    make: Callable[[], Any] = strategy
    if isinstance(strategy, Strategy):
        template = copy.deepcopy(strategy)
        make = lambda: copy.deepcopy(template)  # noqa: E731  # a def would have to be typed twice
    made = make() if callable(make) else make
    if not isinstance(made, Strategy):
        raise TypeError(f"{strategy=}: expected a distclip.Strategy, or a function that makes one")
    for name, parts in histories(steps, seed):
        _History(f"{name!r}, {seed=}", parts, make, memoryless, one_threshold).check()
    for name, parts in levels(steps, seed):
        _History(f"{name!r}, {seed=}", parts, make, memoryless, one_threshold).check_goes_on(steps)


@dataclass
class _Step:
    """What the strategy made of one step."""

    number: int
    norms: Norms
    decision: Decision
    counts: bool  # neither skipped nor non-finite


@dataclass
class _History:
    """The laws over one history. Keeps where it is, to say so when one is broken."""

    name: str
    parts: Sequence[Tensor]
    make: Callable[[], Strategy]
    memoryless: bool
    one_threshold: bool
    record: list[_Step] = field(default_factory=list)
    saved: dict[int, bytes] = field(default_factory=dict)  # state_dicts by the step they were saved before
    at: tuple[int, Norms] | None = None
    who: str = ""

    def check(self) -> None:
        one = self.prepared()
        with random_state(1):
            copied = copy.deepcopy(one)  # and not used before the other is done
            for number, parts in enumerate(self.parts):
                self.take(one, number, self.norms_for(one, parts))
        with random_state(2), as_rank(3):
            for step in self.record:
                self.expect_same("deterministic", copied, step)
        spared = self.prepared()
        counts_skips = bool(spared.kept_through_skips())
        for step in self.record:
            if step.counts or (counts_skips and bool(step.norms.total.isfinite())):
                self.expect_same("no trace", spared, step)
        for turn, number in enumerate(self.saved):
            self.resume(number, load_first=turn % 2 == 0)

    def check_goes_on(self, most: int) -> None:
        strategy, in_a_row = self.prepared(), 0
        for number, parts in enumerate(self.parts):
            norms = self.norms_for(strategy, parts)
            self.at = number, norms
            decision = self.guard("runs", partial(strategy.decide, norms))
            if not norms.total.isfinite():
                continue
            # One that multiplies by 0 from the first step on was made to, say with max_norm=0.
            if _brings_to_0(decision, norms) and not _brings_to_0(self.prepared().decide(norms), norms):
                self.fail("goes on", f"it decided {decision}")
            if decision.skip is not None and norms.total > 0:
                in_a_row = in_a_row + 1 if decision.skip else 0
                if in_a_row > most:
                    self.fail("goes on", f"it skips the {in_a_row}th step in a row")

    def prepared(self) -> Strategy:
        strategy = self.make()
        self.who = repr(strategy)
        self.guard("runs", lambda: strategy.prepare(PARAMETERS))
        return strategy

    def norms_for(self, strategy: Strategy, parts: Tensor) -> Norms:
        if not strategy.per_parameter and not strategy.per_unit:
            slots = self.guard("slots", lambda: [strategy.group_of(p) for p in PARAMETERS])
            for parameter, slot in zip(PARAMETERS, slots, strict=True):
                if slot not in range(len(strategy.groups)):
                    self.fail("slots", f"group_of({parameter.name!r}) is {slot!r}, of {strategy.groups}")
        norms: Norms = self.guard("runs", lambda: norms_for(strategy, parts))
        return norms

    def take(self, strategy: Strategy, number: int, norms: Norms) -> None:
        """One step, with the laws that one step can break."""
        self.at = number, norms
        if number in {0, 1, len(self.parts) // 3, 2 * len(self.parts) // 3}:
            self.saved[number] = self.guard("state_dict", lambda: _saved(strategy))
        given, before, reads = copy.deepcopy(norms), _state(strategy), HostReads()
        with reads.watched():
            decision = self.guard("runs", lambda: strategy.decide(norms))
        if reads.first:
            self.fail("no host sync", reads.first)
        if not (_identical(norms.total, given.total) and _identical(norms.slots, given.slots)):
            self.fail("pure", "it changed the norms in place")
        self.check_form(decision, norms)
        decision = copy.deepcopy(decision)  # whatever happens to the tensors in it
        finite = bool(norms.total.isfinite())
        skipped = decision.skip is not None and bool(decision.skip)
        kept = strategy.kept_through_skips() if finite else frozenset()
        self.check_state(before, _state(strategy), finite and not skipped, kept)
        if finite:
            self.check_values(decision, norms, skipped)
        if finite and not skipped and self.memoryless:
            self.check_twice(strategy, decision, norms)
        self.record.append(_Step(number, norms, decision, finite and not skipped))

    def check_form(self, decision: Decision, norms: Norms) -> None:
        if not isinstance(decision, get_args(Decision)):
            self.fail("decision", f"it returned {decision!r}")
        for name, tensor in _tensors(decision):
            last = name.split(".")[-1]
            dtype = torch.bool if last == "skip" else torch.float32
            shapes = [(), tuple(norms.slots.shape)] if last in ("coefficient", "threshold") else [()]
            wanted = f"expected {dtype} of shape {' or '.join(map(str, shapes))}"
            if not isinstance(tensor, Tensor):
                self.fail("decision", f"{name} is {tensor!r}; {wanted}")
            if tensor.dtype != dtype or tuple(tensor.shape) not in shapes:
                self.fail("decision", f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; {wanted}")

    def check_values(self, decision: Decision, norms: Norms, skipped: bool) -> None:
        for name, tensor in _tensors(decision):
            low = -1.0 if name.endswith("direction") else 0.0  # a cosine
            high = 1.0 if name.endswith(("coefficient", "direction")) else math.inf
            if not ((tensor >= low) & (tensor <= high)).all():
                self.fail("coefficients", f"{name} is {_shown(tensor)}")
        scale, _ = _parts(decision)
        if scale is None or not self.one_threshold:
            return
        # Far enough below to be so whatever eps it adds to the norm, and whatever is rounded.
        below = f"below the threshold {_shown(scale.threshold)}"
        if norms.total * (1 + 1e-5) + 2e-6 < scale.threshold.min():
            if not (scale.coefficient == 1).all():
                self.fail("left alone", f"coefficient is {_shown(scale.coefficient)}, {below}")
            if skipped:
                self.fail("left alone", f"it skips, {below}")

    def check_state(
        self, before: dict[str, Tensor], after: dict[str, Tensor], counts: bool, kept: frozenset[str]
    ) -> None:
        if before.keys() != after.keys():
            self.fail("state", f"buffers were {sorted(before)}, and are {sorted(after)}")
        for name, old in before.items():
            new = after[name]
            was, now = ((t.dtype, tuple(t.shape), str(t.device)) for t in (old, new))
            if was != now:
                self.fail("state", f"buffer {name!r} was {was}, and is {now}")
            if not counts and name not in kept and not _identical(old, new):
                self.fail("no trace", f"buffer {name!r} was {_shown(old)}, and is {_shown(new)}")
            if counts and new.isnan().any() and not old.isnan().any():
                self.fail("state", f"buffer {name!r} is {_shown(new)}")

    def check_twice(self, strategy: Strategy, decision: Decision, norms: Norms) -> None:
        scale, clamp = _parts(decision)
        if clamp is not None and not math.isinf(norms.norm_type):
            return  # what clamping leaves of this norm is not known
        slots = norms.slots if scale is None else norms.slots * scale.coefficient
        slots = slots if clamp is None else torch.minimum(slots, clamp.bound)
        once = replace(norms, total=combine(slots, norms.norm_type), slots=slots)
        again, _ = _parts(strategy.decide(once))
        if again is not None and not (again.coefficient > 1 - 1e-5).all():
            self.fail(
                "idempotent",
                f"once clipped, the slots are {_shown(slots)} and get {_shown(again.coefficient)}",
            )

    def expect_same(self, law: str, other: Strategy, step: _Step) -> None:
        self.at = step.number, step.norms
        decision = self.guard(law, lambda: other.decide(step.norms))
        first, second = dict(_tensors(step.decision)), dict(_tensors(decision))
        if first.keys() != second.keys():
            self.fail(law, f"it decided {step.decision}, and then {decision}")
        for name, tensor in first.items():
            if not _identical(tensor, second[name]):
                self.fail(law, f"{name} is {_shown(tensor)}, and then {_shown(second[name])}")

    def resume(self, number: int, *, load_first: bool) -> None:
        resumed, state = self.make(), torch.load(io.BytesIO(self.saved[number]), weights_only=True)
        actions = (lambda: resumed.load_state_dict(state), lambda: resumed.prepare(PARAMETERS))
        self.at = None
        for action in actions if load_first else actions[::-1]:
            self.guard("state_dict", action)
        for step in self.record[number : number + _FOLLOWED]:
            self.expect_same("state_dict", resumed, step)

    def guard(self, law: str, action: Callable[[], Any]) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # meant for the strategy's user
                return action()
        except Exception as error:
            self.fail(law, f"it raised {type(error).__name__}: {error}", error)

    def fail(self, law: str, what: str, cause: Exception | None = None) -> NoReturn:
        message = f"{self.who} breaks the law {law!r}: {LAWS[law]}.\n  {what}\n  in history {self.name}"
        if self.at is not None:
            number, norms = self.at
            message += f", step {number}: total norm {_shown(norms.total)}, slots {_shown(norms.slots)}"
        raise LawBroken(law, message) from cause


def _tensors(decision: object, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All that a decision holds, by name; but for ``unit``, which is asked about parameters."""
    assert is_dataclass(decision)
    for each in fields(decision):
        value = getattr(decision, each.name)
        if is_dataclass(value):
            yield from _tensors(value, f"{prefix}{each.name}.")
        elif value is not None and each.name != "unit":
            yield f"{prefix}{each.name}", value


def _parts(decision: Decision) -> tuple[Scale | None, Clamp | None]:
    if isinstance(decision, Then):
        return decision.first, decision.second
    return (decision, None) if isinstance(decision, Scale) else (None, decision)


def _brings_to_0(decision: Decision, norms: Norms) -> bool:
    scale, clamp = _parts(decision)
    to_0 = torch.zeros_like(norms.slots, dtype=torch.bool)
    for each in (None if scale is None else scale.coefficient, None if clamp is None else clamp.bound):
        to_0 = to_0 if each is None else to_0 | (each == 0)
    return bool((to_0 & (norms.slots > 0)).any())


def _state(strategy: Strategy) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in strategy.named_buffers()}


def _saved(strategy: Strategy) -> bytes:
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    torch.load(io.BytesIO(file.getvalue()), weights_only=True)  # plain data, that can be read again
    return file.getvalue()


def _identical(a: Tensor, b: Tensor) -> bool:
    alike = (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)
    return alike and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _shown(tensor: Tensor) -> str:
    values = [f"{value:.9g}" for value in tensor.flatten()[:8].tolist()]
    more = ", …" if tensor.numel() > 8 else ""
    return values[0] if tensor.dim() == 0 else f"[{', '.join(values)}{more}]"
