"""What one clipping step did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from distclip.decide.terminal import shown


@dataclass(frozen=True)
class ClipReport:
    """One clipping step, as 0-dim tensors that are equal on every rank and have cost no host sync.

    Attributes:
        total_norm: float32, norm of the whole gradient before clipping.
        clipped_norm: float32, the same after clipping.
        coefficient: float32, ``clipped_norm / total_norm`` (for one global coefficient, that coefficient).
        threshold: float32, what the norm was compared with; [num_slots] where every slot has its own.
        clipped: bool, whether any gradient was reduced.
        nonfinite: bool, whether the total norm was NaN or infinite.
        skipped: bool, whether the optimizer step should be left out. Gradients of a skipped step are
            left as they were.
        direction: float32, the cosine between the gradient before and after, where the strategy measures it.
        loss: float32, the mean over ranks of the loss that the strategy judged, where it does.
        norm_type: p of the norms (∞ for value clipping).

    ``print(report)`` and :meth:`to_dict` read the values, which waits for the device once.
    """

    total_norm: Tensor
    clipped_norm: Tensor
    coefficient: Tensor
    threshold: Tensor
    clipped: Tensor
    nonfinite: Tensor
    skipped: Tensor
    norm_type: float = 2.0
    direction: Tensor | None = None
    loss: Tensor | None = None
    _parameter_norms: Tensor | None = field(default=None, repr=False)  # [num_parameters] float32
    _parameter_names: tuple[str, ...] = field(default=(), repr=False)  # [num_parameters]

    @property
    def param_norms(self) -> dict[str, Tensor]:
        """Norm of each parameter before clipping, by name: 0-dim float32 tensors.

        Raises:
            RuntimeError: per-parameter norms were not asked for, with ``clip(param_norms=True)`` or a
                per-parameter strategy. (They travel in the step's one collective; to fetch them now
                would take another, which all ranks would have to join.)
        """
        if self._parameter_norms is None:
            raise RuntimeError(
                "this step measured no per-parameter norms: call clipper.clip(param_norms=True) on "
                "every rank in the steps that need them"
            )
        return dict(zip(self._parameter_names, self._parameter_norms.unbind(), strict=True))

    def to_dict(self) -> dict[str, float | bool]:
        """The scalars as Python numbers, fetched in one transfer (the only host sync of a step)."""
        names = [
            f.name for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor) and t.dim() == 0
        ]
        values = torch.stack([getattr(self, name).double() for name in names]).tolist()
        return {
            name: bool(value) if getattr(self, name).dtype == torch.bool else value
            for name, value in zip(names, values, strict=True)
        }

    def __str__(self) -> str:
        d = self.to_dict()
        if d["nonfinite"]:
            return f"norm {d['total_norm']:.3g}, not finite" + (", skipped" if d["skipped"] else "")
        if d["skipped"]:
            return f"norm {d['total_norm']:.3g}, skipped"
        if not d["clipped"]:
            return f"norm {d['total_norm']:.3g}"
        if math.isnan(d["clipped_norm"]):  # clamped, and this norm does not tell what that left
            return f"norm {d['total_norm']:.3g}, clamped"
        return shown(f"norm {d['total_norm']:.3g} → {d['clipped_norm']:.3g} (×{d['coefficient']:.3g})")
