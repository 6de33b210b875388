"""What can be wrong with a call that clips, in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Severity = Literal["wrong", "cost", "note"]

_WITH_DISTCLIP = "distclip.clip_grad_norm_(model, max_norm)"
# By kind: how bad it is, what it does to training, and what to do about it.
KINDS: dict[str, tuple[Severity, str, str]] = {
    "ranks-differ": (
        "wrong",
        "each rank scales its gradients by another coefficient, so that replicas and shards drift apart",
        f"take the norm over all ranks that hold the model: {_WITH_DISTCLIP}",
    ),
    "norm": (
        "wrong",
        "the coefficient is not the one that max_norm asks for",
        f"take the norm of the whole gradient, each element once: {_WITH_DISTCLIP}",
    ),
    "ownership": (
        "note",
        "whether the norm is right cannot be told",
        "say how they lie: distclip.declare(module, sharded_over=group) for tensor-parallel and expert "
        "weights, stages=group for pipeline stages",
    ),
    "listed-twice": (
        "wrong",
        "their gradients count twice in the norm",
        "pass each parameter once: model.parameters() does",
    ),
    "iterator": (
        "wrong",
        "an iterator can be read once: from the second call on nothing is clipped",
        "pass list(model.parameters()), or the model itself to distclip.clip_grad_norm_",
    ),
    "not-clipped": (
        "wrong",
        "these parameters are stepped with gradients that nobody clips, nor counts in the norm",
        "pass all that the optimizer steps: distclip.clip_grad_norm_(optimizer, max_norm)",
    ),
    "unclipped-optimizer": (
        "note",
        "its parameters are stepped with whatever gradients there are",
        "if that is not meant: distclip.clip_grad_norm_(optimizer, max_norm)",
    ),
    "clipped-twice": (
        "note",
        "they are scaled by two coefficients in one step",
        "clip once, with all parameters: one norm, one coefficient",
    ),
    "scaled": (
        "wrong",
        "the norm is that of gradients × loss scale, so that nearly every step is clipped, far too much",
        "scaler.unscale_(optimizer) before the clip, or distclip.Clipper(model).step(optimizer, scaler)",
    ),
    "not-synchronised": (
        "wrong",
        "ranks hold other gradients of the same parameters, and clip what is only their own share",
        "clip after the last micro-batch, outside no_sync(); with distclip: `with clipper.accumulate(steps)`",
    ),
    "too-early": (
        "wrong",
        "gradients are clipped that further micro-batches are added to, and not the whole of them",
        "clip once, after the last micro-batch: right before optimizer.step()",
    ),
    "before-backward": (
        "wrong",
        "there are no gradients yet, so that nothing is clipped",
        "clip after loss.backward() and before optimizer.step()",
    ),
    "after-step": (
        "wrong",
        "the step has been taken already, with gradients that were not clipped",
        "clip before optimizer.step()",
    ),
    "nonfinite": (
        "wrong",
        "NaN or infinity has gone into the parameters",
        "leave such steps out: distclip.Clipper(model).step(optimizer) does, on all ranks alike",
    ),
    "muon": (
        "wrong",
        "Muon's update does not depend on the size of the gradient: a coefficient below 1 only pushes it "
        "towards its eps, or throttles what is clipped with it",
        "clip what the other optimizer steps, and leave Muon's parameters out",
    ),
    "self-clipping": (
        "note",
        "it clips its own updates as well",
        "one of the two is enough",
    ),
    "absent": (
        "wrong",
        "the others clip without it, or wait for it for ever",
        "call the function on every rank, in the same step",
    ),
    "digits": (
        "note",
        "the norm is rounded, and the coefficient with it",
        "distclip's norms are float32, from float64 sums",
    ),
    "always": (
        "note",
        "max_norm acts as another learning rate",
        "a larger max_norm",
    ),
    "never": ("note", "max_norm has no effect", "a smaller max_norm, or none"),
    "cost": ("cost", "training waits for it", f"{_WITH_DISTCLIP}: one collective, no wait of the host"),
    "no-call": (
        "note",
        "nothing was judged",
        "no function that the audit knows was called in this process: see `--help` for the list; processes "
        "that a script starts by itself (mp.spawn) are not looked into: start it with torchrun",
    ),
    "unfinished": ("note", "what it would have done is not known", "let the script end, or give --steps"),
}


@dataclass(frozen=True)
class Finding:
    """
    Attributes:
        kind: one of :data:`KINDS`.
        where: the place of the call, "" for what is of no call.
        seen: what was seen, with ranks and figures.
    """

    kind: str
    where: str
    seen: str

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind][0]

    @property
    def message(self) -> str:
        return f"{self.seen}: {KINDS[self.kind][1]}"

    @property
    def remedy(self) -> str:
        return KINDS[self.kind][2]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "severity": self.severity, "message": self.message, "remedy": self.remedy}
