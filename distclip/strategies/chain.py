"""Several strategies, one after the other, on the norms of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from distclip.decide.decision import Clamp, Decision, Scale, Then
from distclip.decide.norms import Norms, combine, grouped
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._base import Strategy, listed
from distclip.strategies.value import Value


class Chain(Strategy):
    """Apply strategies in order, each to what the ones before it leave, at the cost of one.

    .. math:: n_i' = c_i n_i, \\qquad n' = \\Big(\\sum_i (c_i n_i)^p\\Big)^{1/p}

    After a strategy that scales, the norms that the next one sees follow from its coefficients: nothing is
    measured again and there is still one collective. After a ``Value`` they do not. Where it stands before
    all strategies that scale, so that its bound does not depend on this step's norm, ``Σ min(|g|, v)^p``
    travels beside ``Σ |g|^p`` in the same collective (with one more pass over the gradients, so not with
    ``overlap=True``): any strategies that look at the gradient as a whole may follow, and
    ``Chain(Value(v), GlobalNorm(m))`` is optax's ``chain(clip(v), clip_by_global_norm(m))``. Where something
    before it scales, as in ``Chain(GlobalNorm(m), Value(v), GlobalNorm(k))``, what clamping leaves depends on
    this step's norm: then each such ``Value`` in the middle takes **a second collective** of two numbers, and
    one more pass over the gradients. (If all norms are ∞-norms, ``min(n, v)`` is the one after it, and
    nothing is measured again.) What works by parameter or group cannot follow a ``Value``.

    If any link works by parameter or by group, one norm per parameter travels for all of them; the others
    see the groups and the total that these add up to. If any link skips the step, it is skipped, and no
    link remembers it. Coefficients multiply, so that a total norm of 0, ∞ or NaN is met as by the links.

    ``report.total_norm`` is the norm before the chain, ``clipped_norm`` the one after it (NaN after a
    ``Value`` at the end, where p is not ∞). The report's threshold is the smallest of those of the links that
    clip the whole gradient; if there is none, for each parameter the smallest that it is held to.

    Args:
        strategies: two or more, of one ``norm_type``, but for that of a ``Value``. A chain among them counts
            as its links.

    Raises:
        ValueError: the norm types differ, a strategy by parameter or group follows a ``Value``, one occurs
            twice, or none is given.
        TypeError: an argument is no strategy.

    Example:
        >>> Chain(SkipSpikes(), distclip.PerParameter(1.0), distclip.GlobalNorm(5.0), distclip.Value(0.1))
        >>> Chain(distclip.Value(0.1), distclip.GlobalNorm(1.0))
    """

    def __init__(self, *strategies: Strategy) -> None:
        super().__init__()
        links: list[Strategy] = []
        for strategy in strategies:
            if not isinstance(strategy, Strategy):
                raise TypeError(f"{strategy!r}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0)")
            links.extend(strategy.each() if isinstance(strategy, Chain) else [strategy])
        if not links:
            raise ValueError("Chain() of nothing: expected at least one strategy")
        if len(set(map(id, links))) < len(links):
            raise ValueError("the same strategy occurs twice: it would count every step twice; make two")
        norm_types = {link.norm_type for link in links if not isinstance(link, Value)}
        norm_types = norm_types or {links[0].norm_type}
        if len(norm_types) > 1:
            raise ValueError(
                f"strategies of norm types {', '.join(f'{p:g}' for p in sorted(norm_types))}: in a chain "
                "they share the norms of one collective, so they have to agree on norm_type"
            )
        self.norm_type = norm_types.pop()
        self.per_parameter = any(not _is_global(link) for link in links)
        self.uses_loss = any(link.uses_loss for link in links)
        # The positions of each Value whose norm the next link needs: in the same collective, in another one.
        self._measured, self._again = ((), ()) if math.isinf(self.norm_type) else _measured_after(links)
        self.num_extra, self.measures_again = 2 * len(self._measured), bool(self._again)
        if any(isinstance(a, Value) and not _is_global(b) for i, a in enumerate(links) for b in links[i:]):
            raise ValueError(
                "a strategy that works by parameter or group follows a Value, which leaves those norms "
                "unknown: put Value last"
            )
        self.links = nn.ModuleList(links)

    def each(self) -> list[Strategy]:
        """The links, in order."""
        return cast(list[Strategy], list(self.links))

    def prepare(self, parameters: Sequence[ParameterInfo]) -> None:
        for i, link in enumerate(self.each()):
            link.prepare(parameters)
            if _is_grouped(link):
                # [num_parameters] int64: the slot of each parameter in this link.
                index = listed([link.group_of(p) for p in parameters], torch.int64)
                self.register_buffer(f"_group_of_{i}", index, persistent=False)

    def elementwise(self, gradient: Tensor) -> Tensor:
        """For each ``Value`` whose norm is asked for, ``Σ min(|g|, v)^p`` and how many are above v."""
        magnitude, sums, bound, p = gradient.abs().double(), [], None, self.norm_type
        like = magnitude.new_zeros((), dtype=torch.float32)  # as the bound will be that is decided on
        for i, link in enumerate(self.each()[: self._measured[-1] + 1]):
            if isinstance(link, Value):
                own = link.threshold.peek(like)
                bound = own if bound is None else torch.minimum(bound, own)
            if i in self._measured:
                assert bound is not None
                clamped = torch.minimum(magnitude, bound.double())
                sums.append(clamped.square_().sum() if p == 2 else clamped.pow_(p).sum())
                sums.append((magnitude > bound).sum().double())
        return torch.stack(sums)

    def forward(self, norms: Norms) -> Decision:
        # [] or [num_parameters] float64, the product of the coefficients: float32 may have no such number.
        whole = torch.ones_like(norms.total, dtype=torch.float64)
        bound: Tensor | None = None
        skip: Tensor | None = None
        thresholds: list[Tensor] = []  # on the total norm
        fine_thresholds: list[Tensor] = []  # [] or [num_parameters], on the norms of parameters or groups
        known = False  # whether norms.total is what clamping leaves
        unit = None
        links, before = self.each(), norms
        for i, link in enumerate(links):
            index = getattr(self, f"_group_of_{i}") if _is_grouped(link) else None
            decision = link.forward(_seen_by(link, norms, index))
            if isinstance(decision, Then):
                raise TypeError(f"{link} decided to scale and clamp at once: make it two links of the chain")
            if decision.skip is not None:
                skip = decision.skip if skip is None else skip | decision.skip
            if isinstance(decision, Clamp):
                if decision.unit is not None and (bound is not None or i + 1 < len(links)):
                    raise ValueError(f"{link} has to be last in a chain, and the only one there that clamps")
                unit = decision.unit
                bound = decision.bound if bound is None else torch.minimum(bound, decision.bound)
                known = i in self._measured or i in self._again
                if i in self._measured:
                    norms = self._after(i, before)
                elif i in self._again:
                    norms = self._after_more(i, norms, whole, bound)
                else:
                    norms = _clamped(norms, bound, links[i + 1 :])
            else:
                coefficient = _spread(decision.coefficient, link, index)
                norms = _scaled(norms, coefficient)
                whole = whole * coefficient.double()
                if bound is not None:  # clamp, then scale = scale, then clamp at the bound scaled alike
                    bound = torch.where(
                        torch.isinf(bound), bound, _positive(bound.double() * coefficient.double())
                    )
                if _is_global(link):
                    thresholds.append(decision.threshold)
                else:
                    fine_thresholds.append(_spread(decision.threshold, link, index))
        if bound is not None and not thresholds and not fine_thresholds:
            return Clamp(bound, skip, unit=unit)
        scale = Scale(_positive(whole), _smallest(thresholds or fine_thresholds), skip)
        if bound is None:
            return scale
        return Then(scale, Clamp(bound, clipped_norm=norms.total if known else None, unit=unit))

    def _after(self, i: int, norms: Norms) -> Norms:
        """The norms that the ``Value`` at position i leaves of these, which are those before the chain."""
        if norms.extra is None:
            raise self._unknown(i)
        first = 2 * self._measured.index(i)
        return _left(norms, norms.extra[first : first + 2])

    def _after_more(self, i: int, norms: Norms, whole: Tensor, bound: Tensor) -> Norms:
        """The norms that it leaves of these, ``whole`` times those before the chain and held to ``bound``."""
        if norms.clamped is None:
            raise self._unknown(i)
        return _left(norms, norms.clamped(whole, bound))

    def _unknown(self, i: int) -> ValueError:
        return ValueError(
            f"{type(self.each()[i + 1]).__name__} follows a Value and needs the norm that clamping leaves, "
            "which a history of gradient norms does not have"
        )


def _left(norms: Norms, measured: Tensor) -> Norms:
    """``measured``: [2], the power sum of what clamping leaves, and how many elements it changes."""
    total = measured[0].pow(1 / norms.norm_type).float()
    # Bit for bit the same where nothing is clamped.
    total = torch.where(measured[1] > 0, torch.minimum(total, norms.total), norms.total)
    return replace(norms, total=total, slots=total.view(1), labels=("total",))


def _measured_after(links: Sequence[Strategy]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The positions of each ``Value`` whose norm the next link needs, p being finite: of those whose bound
    does not depend on the norm of the step, and of those where something before it scales."""
    beside: list[int] = []
    again: list[int] = []
    for i, (link, following) in enumerate(pairwise(links)):
        if not isinstance(link, Value) or isinstance(following, Value):
            continue
        scales = any(not isinstance(b, Value) and not b.never_scales for b in links[:i])
        (again if scales else beside).append(i)
    return tuple(beside), tuple(again)


def _is_global(link: Strategy) -> bool:
    return not link.per_parameter and len(link.groups) == 1


def _is_grouped(link: Strategy) -> bool:
    return not link.per_parameter and len(link.groups) > 1


def _seen_by(link: Strategy, norms: Norms, index: Tensor | None) -> Norms:
    norms = replace(norms, extra=None)  # the chain's own
    if link.per_parameter:
        return norms
    if index is None:
        return replace(norms, slots=norms.total.view(1), labels=("total",))
    slots = grouped(norms.slots, index, len(link.groups), norms.norm_type)
    return replace(norms, slots=slots, labels=link.groups)


def _spread(values: Tensor, link: Strategy, index: Tensor | None) -> Tensor:
    """From one value for each of a link's slots, or for all, to one for each of the chain's, or for all."""
    if _is_global(link):
        return values.reshape(())
    return values if index is None or values.dim() == 0 else values[index]


def _scaled(norms: Norms, coefficient: Tensor) -> Norms:
    slots = norms.slots * coefficient
    if coefficient.dim() == 0:
        total = norms.total * coefficient
    else:  # bit for bit the same total where nothing was clipped
        total = torch.where((coefficient == 1).all(), norms.total, combine(slots, norms.norm_type))
    return replace(norms, total=total, slots=slots)


def _clamped(norms: Norms, bound: Tensor, following: Sequence[Strategy]) -> Norms:
    if all(isinstance(link, Value) for link in following):
        return norms
    if isinstance(following[0], Value) and not math.isinf(norms.norm_type):
        return norms  # asked for after that one
    if not math.isinf(norms.norm_type) or not all(map(_is_global, following)):
        raise ValueError(
            "a strategy that clamps elements is followed by others, which need norms that are no longer "
            "known: put it last"
        )
    return replace(norms, total=torch.minimum(norms.total, bound), slots=torch.minimum(norms.slots, bound))


def _positive(value: Tensor) -> Tensor:
    """As float32; no less than its least normal number where it is positive. (NaN stays.)"""
    return torch.where(value > 0, value.clamp(min=torch.finfo(torch.float32).tiny), value).float()


def _smallest(thresholds: Sequence[Tensor]) -> Tensor:
    smallest = thresholds[0]
    for threshold in thresholds[1:]:
        smallest = torch.minimum(smallest, threshold)
    return smallest
