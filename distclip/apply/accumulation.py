"""Gradient accumulation: micro-batches whose gradients are synchronised, clipped and used together."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from distclip.layout.arguments import require_scaler

logger = logging.getLogger("distclip")

Weight: TypeAlias = float | Tensor
"""How much a micro-batch counts, ≥ 0: a number, or one element of any real dtype."""


@dataclass
class Window:
    """Where in its window of micro-batches a clipper stands.

    Its clock is the number of ``with`` blocks, which the program makes alike on all ranks, whichever of them
    raise on some ranks only: by it they decide when to synchronise. What each rank has to show for its blocks
    is settled by itself, before that (:meth:`make_up`), so that no rank needs to know of another's.

    Attributes:
        steps: micro-batches in a whole window.
        position: blocks of this window begun so far, also before a restart.
        begun: those of them since then.
        done: those of them whose gradients ``micro.backward`` has brought, on this rank.
        raw: whether gradients have come by another way.
        last: whether the block begun last is the last of the window.
        failed: whether one of them raised, or is known to have left its backward pass out.
        broken: whether ``.grad`` holds a part of the gradients of one that raised within its backward pass.
        weights: Σ of the weights of this rank's micro-batches, float64; None while there are none.
        weighted: whether its micro-batches have weights; None while no backward pass tells.
        current: the micro-batch that is going on.
        staged: whether this is one stage of a pipeline.
    """

    steps: int = 1
    position: int = 0
    begun: int = 0
    done: int = 0
    raw: bool = False
    last: bool = True
    failed: bool = False
    broken: bool = False
    weights: Weight | None = None
    weighted: bool | None = None
    current: MicroBatch | None = field(default=None, repr=False)
    staged: bool = False

    def begin(self, steps: int, last: bool, own_gradients: Callable[[], list[Tensor]]) -> MicroBatch:
        """
        Args:
            own_gradients: what this rank has accumulated and not synchronised.

        Raises:
            ValueError: inside another micro-batch, or ``steps`` changes within a window. So on every rank.
        """
        if self.current is not None:
            raise ValueError(
                "clipper.accumulate() inside clipper.accumulate(): each micro-batch is one `with` block of "
                "its own. Leave the inner one out, or accumulate over the product of both numbers."
            )
        if self.begun and self.last:  # complete, and never used: step() raised, say
            self.close()
        if self.begun and steps != self.steps:
            raise ValueError(f"{steps=}: this window of {self.steps} micro-batches is not complete")
        if self.failed and not own_gradients():  # whoever caught it has called zero_grad()
            self.done, self.weights, self.broken, self.raw = 0, None, False, False
        self.steps = steps
        self.position += 1
        self.begun += 1
        self.last = last or self.position >= steps
        self.current = MicroBatch(self, own_gradients)
        return self.current

    def end(self, *, raised: bool) -> None:
        """The block is over. Without gradients of its own it does not count, and where it was to synchronise
        the next one takes its place."""
        micro, self.current = self.current, None
        assert micro is not None
        if not self.begun:  # the step was taken within the block
            return
        if micro.done:  # its gradients are there, whatever came after
            self.done += 1
            return
        if not (raised or micro.began or self.done):
            return  # gradients may have come by another way
        self.failed = True
        if micro.began:
            self.broken = True
            logger.warning(
                "rank %d: the backward pass of micro-batch %d of %d raised before its end, and .grad may "
                "hold a part of its gradients. They become NaN with the last micro-batch of the window, so "
                "that no rank takes a step with them (see on_nonfinite), unless optimizer.zero_grad() is "
                "called before the next one.", _rank(), self.position, self.steps,
            )  # fmt: skip
        if self.last:
            self.position -= 1
            self.begun -= 1
            self.last = not (self.begun or self.broken)
        micro.complete = False

    def make_up(self, own_gradients: Callable[[], list[Tensor]]) -> float:
        """Before the last backward pass of a window, on this rank alone: what it is to be multiplied by, so
        that the sum over ``begun`` micro-batches becomes ``begun`` times the mean over those whose gradients
        are there. The others' are multiplied here."""
        if self.broken:
            self.broken = False
            return math.nan
        factor = self.begun / (self.done + 1)
        if self.weighted or self.raw or factor == 1:
            return 1.0
        with torch.no_grad():
            for gradient in own_gradients():
                gradient.mul_(factor)
        return factor

    def require_complete(self) -> None:
        """
        Raises:
            ValueError: more micro-batches are to come. So on every rank.
        """
        if self.broken:
            raise ValueError(
                "the backward pass of the last micro-batch raised before its end, and .grad may hold a part "
                "of its gradients: call optimizer.zero_grad() instead, and go on with the next micro-batch, "
                "which takes its place"
            )
        if not self.last:
            raise ValueError(
                f"micro-batch {self.position} of {self.steps}: gradients are not synchronised before the "
                "last one. Clip where `micro.complete` is true, or pass last=True to accumulate()."
            )

    def require_alike(self, weighted: bool) -> None:
        """
        Raises:
            ValueError: some micro-batches of the window have weights and others not; or weights in a
                pipeline, whose other stages do not know of them, and would not wait for their sum.
        """
        if weighted and self.staged:
            raise ValueError(
                "weight= with a Clipper(stages=...): only the last stage knows the weights. Multiply the "
                "loss by weight / (mean weight of all micro-batches) in the loss function of the schedule."
            )
        if self.weighted is not None and self.weighted is not weighted:
            raise ValueError(
                "some micro-batches of this window pass weight= to micro.backward() and others do not: their "
                "gradients would not be parts of one mean. Pass a weight for all of them or for none."
            )

    def count(self, weight: Weight | None) -> None:
        """A backward pass is done."""
        self.weighted = weight is not None
        if weight is not None:
            self.weights = weight if self.weights is None else self.weights + weight

    @property
    def missing(self) -> float:
        """What an average over fewer micro-batches than ``steps`` has to be multiplied by."""
        if not self.begun or self.weighted:
            return 1.0
        return self.steps / self.begun

    def weight_on(self, device: torch.device) -> Tensor | None:
        """[1] float64, a new tensor: Σ of this rank's weights, or None where micro-batches have none."""
        if self.weights is None:
            return None
        if isinstance(self.weights, Tensor):
            return self.weights.to(device, torch.float64, copy=True).reshape(1)
        return torch.full((1,), self.weights, dtype=torch.float64, device=device)

    def close(self) -> None:
        self.position = self.begun = self.done = 0
        self.last = True
        self.failed = self.broken = self.raw = False
        self.weights = self.weighted = None


class MicroBatch:
    """One micro-batch, as ``clipper.accumulate(steps)`` gives it.

    Attributes:
        complete: whether it is the last of its window, after which to call ``clipper.step()``.
    """

    def __init__(self, window: Window, own_gradients: Callable[[], list[Tensor]]) -> None:
        self._window, self._own_gradients = window, own_gradients
        self._steps = window.steps
        self.complete = window.last
        self.began = self.done = False  # its backward pass

    def backward(
        self, loss: Tensor, scaler: GradScaler | None = None, *, weight: Weight | None = None
    ) -> None:
        """``(loss / steps).backward()``, scaled by ``scaler`` where there is one.

        The gradients of a whole window so are those of the mean of its losses. Where a window has fewer
        micro-batches, ``clipper.step()`` makes up for the difference, in the multiplication that clips. (Who
        calls ``loss.backward()`` divides by ``steps`` as well.)

        With ``weight``, say the number of tokens that ``loss`` is the mean of, the gradients of a window are

        .. math:: \\sum_i w_i \\nabla\\ell_i \\Big/ \\sum_i w_i

        over the micro-batches of the window and of all ranks (whose gradients DDP or FSDP averages): every
        token counts the same, wherever it is. ``(weight * loss).backward()`` here, and ``clipper.step()`` or
        ``clip()`` divides by the sum of the weights in the multiplication that clips. That sum travels in the
        step's one collective; where there is none (replicas under DDP) or it does not reach all ranks or is
        no sum (hybrid sharding, p = ∞, unit-wise strategies), in a small all-reduce of one number. Until the
        clip ``.grad`` is larger than the mean by the mean weight of a rank, and so a dynamic loss scale for
        float16 settles lower.

        Args:
            loss: one element.
            scaler: that scales the loss, if any.
            weight: ≥ 0; a number, or a tensor of one element, which the host does not read. A rank without
                a share of the micro-batch passes 0. For all micro-batches of a window on all ranks, or none.

        Raises:
            ValueError: this micro-batch had a backward pass already, or is over; only some micro-batches of
                the window have weights, or the clipper has ``stages``; a weight is negative or not finite, or
                has several elements.
            TypeError: ``loss`` or ``weight`` is nothing of that kind.

        Example:
            >>> with clipper.accumulate(4) as micro:
            ...     micro.backward(mean_loss, scaler, weight=num_tokens)
        """
        window = self._window
        if window.current is not self:
            raise ValueError(
                "micro.backward() outside its `with clipper.accumulate(...)` block, which decides whether "
                "gradients are synchronised: call it inside"
            )
        if self.began:
            raise ValueError(
                "micro.backward() was called twice in one micro-batch, whose gradients would count twice. "
                "Add its losses up, micro.backward(first + second), or open one accumulate() for each."
            )
        if not isinstance(loss, Tensor):
            raise TypeError(
                f"micro.backward() was given a {type(loss).__name__}: expected the loss, a tensor"
            )
        if loss.numel() != 1:
            raise ValueError(
                f"micro.backward() was given a loss of shape {tuple(loss.shape)}: expected one number, "
                "loss.mean() say"
            )
        if not loss.requires_grad:
            raise ValueError(
                "micro.backward() was given a loss that requires no gradient, so there is nothing to go back "
                "to: was it computed under no_grad(), detached, or do no parameters train?"
            )
        require_scaler(scaler)
        exact = None if weight is None else _as_weight(weight)
        window.require_alike(exact is not None)
        if exact is None:
            loss = loss / self._steps
        else:
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            loss = loss * (exact.to(loss.device, loss.dtype) if isinstance(exact, Tensor) else exact)
        if window.last and (factor := window.make_up(self._own_gradients)) != 1:
            loss = loss * factor
        self.began = True
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
        self.done = True
        window.count(exact)


def _as_weight(weight: Weight) -> Weight:
    """A float, or [] float64 on the weight's own device."""
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex():
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} and {weight.dtype}: expected one real number for "
                "this micro-batch, mask.sum() say"
            )
        return weight.detach().reshape(()).double()
    try:
        number = float(weight)
    except (TypeError, ValueError):
        raise TypeError(
            f"weight is a {type(weight).__name__}: expected a number, or a tensor of one element"
        ) from None
    if not 0 <= number < math.inf:
        raise ValueError(f"{weight=}: expected a finite number that is not negative")
    return number


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
