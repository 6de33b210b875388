"""The rounding by which copies may differ, and what is said of it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from distclip.layout.scope import Scope
from distclip.planning.fingerprint import EXACT

logger = logging.getLogger("distclip")


@dataclass
class Rounding:
    """How far apart the copies of one plan have been said to be in the log, relatively."""

    said: float = 0.0

    def say(self, spread: Tensor, names: Sequence[str], scope: Scope) -> None:
        """One log line where copies differ by rounding, and one more where that has grown tenfold: training
        goes on, but somebody should look. ``spread``: [len(names), ...], on the CPU."""
        apart = spread.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if not apart.numel() or dist.get_rank() != scope.ranks[0]:
            return
        if (most := float(apart.amax())) > max(EXACT, 9.9 * self.said):
            self.said = most
            row = int(apart.amax(dim=1).argmax())
            logger.warning(
                "copies of parameter %r on different ranks are not equal to the last bit: they, or their "
                "gradients, differ by about %.1g (relative). So little is taken for rounding. If it grows, "
                "look for what ranks compute in another order, and for gradients that nobody synchronises.",
                names[row], float(apart[row].amax()),
            )  # fmt: skip
