"""Gradient accumulation: micro-batches whose gradients are synchronised, clipped and used together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.amp.grad_scaler import GradScaler


@dataclass
class Window:
    """Where in its window of micro-batches a clipper stands.

    Attributes:
        steps: micro-batches in a whole window.
        position: micro-batches of this window begun so far, also before a restart.
        backwards: those of them begun since then, whose gradients are really there.
        last: whether the micro-batch begun last is the last of the window.
    """

    steps: int = 1
    position: int = 0
    backwards: int = 0
    last: bool = True

    def begin(self, steps: int, last: bool) -> None:
        if self.backwards and self.last:  # complete, and never used: step() raised, say
            self.close()
        if self.backwards and steps != self.steps:
            raise ValueError(f"{steps=}: this window of {self.steps} micro-batches is not complete")
        self.steps = steps
        self.position += 1
        self.backwards += 1
        self.last = last or self.position >= steps

    def require_complete(self) -> None:
        """
        Raises:
            ValueError: more micro-batches are to come. So on every rank.
        """
        if not self.last:
            raise ValueError(
                f"micro-batch {self.position} of {self.steps}: gradients are not synchronised before the "
                "last one. Clip where `micro.complete` is true, or pass last=True to accumulate()."
            )

    @property
    def missing(self) -> float:
        """What an average over fewer micro-batches than ``steps`` has to be multiplied by."""
        return self.steps / self.backwards if self.backwards else 1.0

    def close(self) -> None:
        self.position = self.backwards = 0
        self.last = True


class MicroBatch:
    """One micro-batch, as ``clipper.accumulate(steps)`` gives it.

    Attributes:
        complete: whether it is the last of its window, after which to call ``clipper.step()``.
    """

    def __init__(self, window: Window) -> None:
        self._steps = window.steps
        self.complete = window.last

    def backward(self, loss: Tensor, scaler: GradScaler | None = None) -> None:
        """``(loss / steps).backward()``, scaled by ``scaler`` where there is one.

        The gradients of a whole window so are those of the mean of its losses. Where a window has fewer
        micro-batches, ``clipper.step()`` makes up for the difference, in the multiplication that clips. (Who
        calls ``loss.backward()`` divides by ``steps`` as well.)
        """
        loss = loss / self._steps
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[no-untyped-call]
