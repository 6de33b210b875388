"""Several strategies, one after the other, on the norms of one step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from distclip._decision import Clamp, Decision, Scale, Then
from distclip._norms import Norms, combine, grouped
from distclip._parameters import ParameterInfo
from distclip.strategies._base import Strategy
from distclip.strategies.value import Value


class Chain(Strategy):
    """Apply strategies in order, each to what the ones before it leave, at the cost of one.

    .. math:: n_i' = c_i n_i, \\qquad n' = \\Big(\\sum_i (c_i n_i)^p\\Big)^{1/p}

    After a strategy that scales, the norms that the next one sees follow from its coefficients: nothing is
    measured again and there is still one collective. After one that clamps elements they do not, so a
    ``Value`` stands last. (If all norms are ∞-norms they do, ``min(n, v)``: then strategies that scale the
    gradient as a whole may follow a ``Value``.)

    If any link works by parameter or by group, one norm per parameter travels for all of them; the others
    see the groups and the total that these add up to. If any link skips the step, it is skipped, and no
    link remembers it. Coefficients multiply, so that a total norm of 0, ∞ or NaN is met as by the links.

    The report's threshold is the smallest of those of the links that clip the whole gradient; if there is
    none, for each parameter the smallest that it is held to.

    Args:
        strategies: two or more, of one ``norm_type``, except that of a ``Value`` at the end. A chain among
            them counts as its links.

    Raises:
        ValueError: the norm types differ, a ``Value`` is not last, a strategy occurs twice, or none is given.
        TypeError: an argument is no strategy.

    Example:
        >>> Chain(SkipSpikes(), distclip.PerParameter(1.0), distclip.GlobalNorm(5.0), distclip.Value(0.1))
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
        measured = links[:-1] if isinstance(links[-1], Value) and len(links) > 1 else links
        norm_types = {link.norm_type for link in measured}
        if len(norm_types) > 1:
            raise ValueError(
                f"strategies of norm types {', '.join(f'{p:g}' for p in sorted(norm_types))}: in a chain "
                "they share the norms of one collective, so they have to agree on norm_type. If one of them "
                "is a Value, put Value last"
            )
        self.norm_type = norm_types.pop()
        self.per_parameter = any(not _is_global(link) for link in links)
        self.uses_loss = any(link.uses_loss for link in links)
        clamps = [i for i, link in enumerate(links) if isinstance(link, Value)]
        if clamps and not all(_is_global(link) for link in links[clamps[0] :]):
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
                index = torch.tensor([link.group_of(p) for p in parameters], dtype=torch.int64)
                self.register_buffer(f"_group_of_{i}", index, persistent=False)

    def forward(self, norms: Norms) -> Decision:
        whole = torch.ones_like(norms.total)  # [] or [num_parameters], the product of the coefficients
        bound: Tensor | None = None
        skip: Tensor | None = None
        thresholds: list[Tensor] = []  # on the total norm
        fine_thresholds: list[Tensor] = []  # [] or [num_parameters], on the norms of parameters or groups
        for i, link in enumerate(self.each()):
            index = getattr(self, f"_group_of_{i}") if _is_grouped(link) else None
            decision = link.forward(_seen_by(link, norms, index))
            if isinstance(decision, Then):
                raise TypeError(f"{link} decided to scale and clamp at once: make it two links of the chain")
            if decision.skip is not None:
                skip = decision.skip if skip is None else skip | decision.skip
            if isinstance(decision, Clamp):
                bound = decision.bound if bound is None else torch.minimum(bound, decision.bound)
                norms = _clamped(norms, bound, self.each()[i + 1 :])
            else:
                coefficient = _spread(decision.coefficient, link, index)
                norms = _scaled(norms, coefficient)
                whole = whole * coefficient
                if bound is not None:  # clamp, then scale = scale, then clamp at the bound scaled alike
                    bound = bound * coefficient
                if _is_global(link):
                    thresholds.append(decision.threshold)
                else:
                    fine_thresholds.append(_spread(decision.threshold, link, index))
        if bound is not None and not thresholds and not fine_thresholds:
            return Clamp(bound, skip)
        scale = Scale(whole, _smallest(thresholds or fine_thresholds), skip)
        return scale if bound is None else Then(scale, Clamp(bound))


def _is_global(link: Strategy) -> bool:
    return not link.per_parameter and len(link.groups) == 1


def _is_grouped(link: Strategy) -> bool:
    return not link.per_parameter and len(link.groups) > 1


def _seen_by(link: Strategy, norms: Norms, index: Tensor | None) -> Norms:
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
    if not following:
        return norms
    if not math.isinf(norms.norm_type) or not all(map(_is_global, following)):
        raise ValueError(
            "a strategy that clamps elements is followed by others, which need norms that are no longer "
            "known: put it last"
        )
    return replace(norms, total=torch.minimum(norms.total, bound), slots=torch.minimum(norms.slots, bound))


def _smallest(thresholds: Sequence[Tensor]) -> Tensor:
    smallest = thresholds[0]
    for threshold in thresholds[1:]:
        smallest = torch.minimum(smallest, threshold)
    return smallest
