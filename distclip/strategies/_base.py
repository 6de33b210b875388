"""The interface of every clipping algorithm, and the laws that one must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distclip.decide.decision import Decision
from distclip.decide.norms import Norms
from distclip.decide.parameter_info import ParameterInfo
from distclip.strategies._saved import require_own
from distclip.torch_private.operators import LOSES_SCALARS

SUPPORTED_NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf)


class Strategy(nn.Module):
    """A clipping algorithm: the norms of a step in, a decision out.

    Write :meth:`forward` as if there were one device: the norms are those of the whole gradient, the
    same on every rank. Register whatever must be remembered as buffers; they are moved to the norms'
    device, travel in ``state_dict()``, and are rolled back when a step turns out non-finite or skipped
    (those that are named in ``through_skips`` only where it is non-finite).

    A strategy keeps these laws, which ``distclip.testing.check_strategy`` runs over one of your own:

    - *pure*: it reads nothing but ``norms`` and its own buffers, and changes nothing but its buffers;
      the same history gives the same decisions, on every rank and when replayed from a log;
    - *no host sync*: no ``.item()``, no ``bool(tensor)``; use ``torch.where`` and ``clamp``;
    - coefficients are in [0, 1], and exactly 1 where nothing is to be clipped;
    - clipping what is already clipped changes it by rounding at most;
    - nothing stops for ever: whatever finite norms come, what it has learned multiplies no gradient by 0 (a
      norm of 0 teaches nothing), and it does not skip one step after the other without an end.

    Attributes:
        norm_type: p of the norms it wants: 0.5, 1, 2, 3 or ∞.
        per_parameter: true to get one norm for every parameter in ``norms.slots``.
        per_unit: true to get one norm for every unit (row of dim 0, or whole parameter of one dim) in
            ``norms.slots``, and the norms of the parameters' own units in ``norms.weights``. p is 2.
        num_extra: how many sums :meth:`elementwise` returns.
        measures_again: true to get ``norms.clamped``, which measures what clamping leaves, in a collective of
            its own.
        uses_loss: true to get the step's loss in ``norms.loss``: then ``clip`` and ``step`` ask for it, and
            the one all-reduce goes over all ranks, also where all hold the same. p ≠ ∞.
        by_element: true if it decides on a ``Clamp`` with a ``unit``, which is asked parameter by parameter.
        never_scales: true if its coefficient is always 1, so that norms after it are those before it.
        through_skips: names of its buffers that keep what :meth:`forward` wrote in a step that is skipped:
            what it takes to count skips, and nothing that a spike could move.
        sizes: by the name of a buffer, the argument that sets its length, for the error about a state that
            was saved with another.
        since: names of its buffers that states saved by earlier releases lack; they are 0 then.
        groups: otherwise, the labels of the slots; :meth:`group_of` assigns parameters to them.

    Example:
        >>> class HalfAboveOne(distclip.Strategy):
        ...     def forward(self, norms):
        ...         one = torch.ones_like(norms.total)
        ...         coefficient = torch.where(norms.total > 1, 0.5 * one, one)
        ...         return distclip.Scale(coefficient, threshold=one)
    """

    norm_type: float = 2.0
    per_parameter: bool = False
    per_unit: bool = False
    num_extra: int = 0
    measures_again: bool = False
    uses_loss: bool = False
    by_element: bool = False
    never_scales: bool = False
    through_skips: tuple[str, ...] = ()
    sizes: Mapping[str, str] = {}  # replaced, never changed
    since: tuple[str, ...] = ()
    groups: tuple[str, ...] = ("total",)

    def group_of(self, parameter: ParameterInfo) -> int:
        """The slot of a parameter, an index into ``groups``."""
        return 0

    def prepare(self, parameters: Sequence[ParameterInfo]) -> None:
        """Called with the parameters, in the order of the per-parameter slots, before the first decision
        and again when others begin to train: the place to size state that is kept for each of them."""

    def names_parameters(self) -> bool:
        """Whether it, or a strategy inside it, is ``by_element``."""
        return any(isinstance(m, Strategy) and m.by_element for m in self.modules())

    def elementwise(self, gradient: Tensor) -> Tensor:
        """Sums over the elements of one local gradient that are wanted beside the norm, [num_extra] float64.

        They are added up over all gradients and ranks, each element once, in the step's one collective, and
        arrive as ``norms.extra``. For p ≠ ∞. ``gradient`` is unscaled, strided, of any dtype; change nothing.
        """
        raise NotImplementedError

    def forward(self, norms: Norms) -> Decision:
        raise NotImplementedError

    @torch.no_grad()
    def decide(self, norms: Norms) -> Decision:
        """:meth:`forward`, with the buffers left as they were if the step is non-finite or skipped (then but
        for ``through_skips``).

        Raises:
            ValueError: inside ``torch.compile``, with state on the CPU that it would not keep.
        """
        if LOSES_SCALARS and torch.compiler.is_compiling() and any(map(_is_lost, self.buffers())):
            raise ValueError(
                f"{type(self).__name__} keeps 0-dim float64 state on the CPU, whose changes a compiled "
                "function loses (before torch 2.15): clip outside of torch.compile"
            )
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        decision = self.forward(norms)
        if before:
            finite = torch.isfinite(norms.total)
            taken = finite if decision.skip is None else finite & ~decision.skip
            kept = self.kept_through_skips() if decision.skip is not None else frozenset()
            for name, buffer in self.named_buffers():
                buffer.copy_(torch.where(finite if name in kept else taken, buffer, before[name]))
        return decision

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        """Of an earlier release, perhaps."""
        super().__setstate__(pickled)  # type: ignore[no-untyped-call]
        for name in self.since:
            if name not in self._buffers:
                self.register_buffer(name, state((), 0, torch.int64))

    def kept_through_skips(self) -> frozenset[str]:
        """The ``through_skips`` of it and of the strategies inside it, as :meth:`named_buffers` has them."""
        return self._named("through_skips")

    def since_then(self) -> frozenset[str]:
        """The ``since`` of it and of the strategies inside it, likewise."""
        return self._named("since")

    def _named(self, attribute: str) -> frozenset[str]:
        return frozenset(
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in self.named_modules()
            if isinstance(module, Strategy)
            for name in getattr(module, attribute)
        )

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Continue from a ``state_dict()`` of a strategy of the same class and sizes, of this or an earlier
        release. Thresholds and other settings are not part of it and may change.

        Raises:
            ValueError: another strategy saved it, or the same with other sizes; nothing has been changed.
        """
        if strict:
            require_own(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self.since:
            state_dict.setdefault(prefix + name, torch.zeros_like(self.get_buffer(name)))
        super()._load_from_state_dict(state_dict, prefix, *args)


def state(shape: Sequence[int], value: float, dtype: torch.dtype) -> Tensor:
    """A new buffer on the CPU, whatever torch's default dtype and device are. (The clipper moves it.) Made in
    inference mode it would be a tensor that no later step may change."""
    with torch.inference_mode(False):
        return torch.full(tuple(shape), value, dtype=dtype, device="cpu")


def listed(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """[len(values)], likewise."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device="cpu")


def _is_lost(buffer: Tensor) -> bool:
    return buffer.dim() == 0 and buffer.dtype == torch.float64 and buffer.device.type == "cpu"


def require_norm_type(norm_type: float | str) -> float:
    """p as a float.

    Raises:
        ValueError: p is none of 0.5, 1, 2, 3, ∞.
    """
    try:
        p = float(norm_type)
    except (TypeError, ValueError):
        p = math.nan
    if p not in SUPPORTED_NORM_TYPES:
        raise ValueError(f"{norm_type=}: expected one of 0.5, 1, 2, 3, inf")
    return p


def require_bound(name: str, value: float) -> float:
    """A threshold as a float.

    Raises:
        ValueError: it is negative, NaN or no number. (A negative one would flip the gradient's sign.)
    """
    try:
        bound = float(value)
    except (TypeError, ValueError):
        bound = math.nan
    if not bound >= 0:
        raise ValueError(f"{name}={value!r}: expected a number that is not negative")
    return bound


def scale_to(norm: Tensor, max_norm: float | Tensor, eps: float) -> Tensor:
    """``min(1, max_norm / (norm + eps))``, as torch computes it; 1 where ``max_norm`` is infinite."""
    coefficient = torch.clamp(max_norm / (norm + eps), max=1.0)
    if isinstance(max_norm, float):
        return torch.ones_like(norm) if math.isinf(max_norm) else coefficient
    return torch.where(torch.isinf(max_norm), 1.0, coefficient)
