"""From the notes of all ranks to findings. Pure: the same notes, the same judgement."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from distclip.audit.exchange import ranks_in_words
from distclip.audit.finding import Finding
from distclip.audit.note import Notes, Part, Place, Sample, joined
from distclip.inspection.advice import suggest_max_norm

_CLOSE = 1e-3  # relative: what is further apart is another number
_OFTEN, _SELDOM = 0.95, 20  # clipped in more than that; never in so many
_DEAR = 0.05  # of the time


@dataclass
class Judged:
    """One place.

    Attributes:
        norm, true_norm: of the latest call that was looked into; None where there is none, or none is known.
        norms: by call, what was returned to rank 0, and the norm of the whole gradient where it is known.
        looked: whether any call was looked into.
        seconds: a call; ``share``: of the time of the script. ``collectives``, ``syncs``: a call.
        ours: seconds of distclip for the same gradients, without its collective; None if not measured.
    """

    function: str
    where: str
    calls: int
    ranks: tuple[int, ...]
    norm: float | None = None
    true_norm: float | None = None
    max_norm: float | None = None
    norms: list[tuple[int, float, float | None]] = field(default_factory=list)
    seconds: float = 0.0
    ours: float | None = None
    share: float = 0.0
    collectives: int = 0
    syncs: int = 0
    findings: list[Finding] = field(default_factory=list)
    looked: bool = False


@dataclass
class Judgement:
    """
    Attributes:
        verdict: "right", "wrong" or "unknown".
        overhead: seconds that the audit took for each call, on rank 0.
        general: findings that are of no place.
    """

    verdict: str
    world_size: int
    calls: list[Judged]
    general: list[Finding]
    overhead: float
    troubles: list[str]

    @property
    def findings(self) -> list[Finding]:
        return [f for call in self.calls for f in call.findings] + self.general


def judge(notes: Mapping[int, Notes]) -> Judgement:
    """``notes``: by rank, of those that left any."""
    first = notes[min(notes)]
    world_size = max(n.world_size for n in notes.values())
    places: defaultdict[tuple[str, str], dict[int, Place]] = defaultdict(dict)
    for rank, own in notes.items():
        for place in own.places:
            places[place.function, place.where][rank] = place
    calls = [_judge_place(by_rank, notes, world_size) for by_rank in places.values()]
    general = list(_steppers(notes, any(c.calls for c in calls)))
    late = {rank for rank in range(world_size) if rank not in notes or not notes[rank].ended}
    for rank, own in notes.items():
        if own.nonfinite and not any(f.kind == "nonfinite" for f in general):
            general.append(Finding("nonfinite", "", f"{_names(own.nonfinite)} are not finite on rank {rank}"))
    if late and calls:
        general.append(Finding("unfinished", "", f"rank(s) {ranks_in_words(late)} did not come to an end"))
    if not calls:
        general.append(Finding("no-call", "", "no call that clips was seen"))
    found = [f for call in calls for f in call.findings] + general
    doubtful = {"ownership", "no-call"} & {f.kind for f in found} or not all(c.looked for c in calls)
    verdict = "wrong" if any(f.severity == "wrong" for f in found) else "unknown" if doubtful else "right"
    count = sum(place.calls for place in first.places)
    troubles = [f"rank {rank}: {text}" for rank, own in notes.items() for text in own.troubles]
    return Judgement(verdict, world_size, calls, general, first.overhead / max(count, 1), troubles)


def _judge_place(by_rank: dict[int, Place], notes: Mapping[int, Notes], world_size: int) -> Judged:
    first_rank = min(by_rank)
    place = _together(by_rank)
    seconds = place.seconds / max(place.timed, 1)
    script = notes[first_rank].seconds - notes[first_rank].overhead
    share = seconds * place.calls / script if script > 0 else 0.0
    judged = Judged(
        place.function,
        place.where,
        place.calls,
        tuple(sorted(by_rank)),
        seconds=seconds,
        ours=place.ours,
        share=share,
    )
    found: dict[str, Finding] = {}  # the first of each kind
    calls: defaultdict[int, dict[int, Sample]] = defaultdict(dict)
    for rank, own in by_rank.items():
        for sample in own.samples:
            calls[sample.call][rank] = sample
    for number, samples in sorted(calls.items()):
        for kind, seen in _judge_call(judged, number, samples, world_size, place.kind):
            found.setdefault(kind, Finding(kind, place.where, seen))
    if "not-synchronised" in found:  # the rest follows from it
        for kind in ("ranks-differ", "norm", "ownership"):
            found.pop(kind, None)
    if "ranks-differ" not in found and "norm" not in found and judged.true_norm is not None:
        found.pop("ownership", None)  # the script counts as they lie
    for kind, seen in _habits(judged, place, by_rank, notes, world_size):
        found.setdefault(kind, Finding(kind, place.where, seen))
    judged.findings = list(found.values())
    judged.looked = bool(calls)
    return judged


def _together(by_rank: dict[int, Place]) -> Place:
    """What was seen on any rank, in the numbers of the one that saw it most."""
    places = list(by_rank.values())
    most = {
        name: max(getattr(p, name) for p in places)
        for name in ("empty", "stale", "early", "exhausted", "nonfinite_steps")
    }
    return replace(by_rank[min(by_rank)], **most)


# --- one call on all ranks ----------------------------------------------------------------------------------


def _judge_call(
    judged: Judged, number: int, samples: dict[int, Sample], world_size: int, kind: str
) -> Iterator[tuple[str, str]]:
    one = next(iter(samples.values()))
    judged.max_norm = one.max_norm
    judged.collectives = max(judged.collectives, one.collectives)
    judged.syncs = max(judged.syncs, one.syncs)
    if any(s.scaled for s in samples.values()) and kind != "measure":
        yield (
            "scaled",
            f"call {number}: a GradScaler has scaled the loss, and nobody has unscaled the gradients",
        )
    twice = sorted({part.name for s in samples.values() for part in s.parts if part.times > 1})
    if twice:
        yield "listed-twice", f"{_names(twice)} in the list more than once"
    returned = {rank: _returned(sample, samples) for rank, sample in samples.items()}
    known = {rank: norm for rank, norm in returned.items() if norm is not None}
    judged.norm = known[min(known)] if known else None
    if len(samples) < world_size:
        if known:
            judged.norms.append((number, known[min(known)], None))
        return  # of some ranks this call is not known, or they make it elsewhere
    counted = _Counted(samples, one.p)
    if counted.unsynchronised and kind != "measure":
        yield (
            "not-synchronised",
            f"call {number}: {_names(counted.unsynchronised)} have the same values on all ranks, and other "
            "gradients",
        )
    judged.true_norm = None if counted.unsynchronised or kind == "scale" else counted.norm
    if known:
        judged.norms.append((number, known[min(known)], judged.true_norm))
    if counted.undeclared and kind != "measure":
        yield "ownership", f"{_names(counted.undeclared)}: plain tensors that are not the same on every rank"
    if kind == "measure":
        return  # what the script makes of it is judged where it clips
    digits = max(_rounding(s.digits) for s in samples.values())
    coarse = max([digits, *(_rounding(part.dtype) for s in samples.values() for part in s.parts)])
    if len(known) > 1 and _apart(known.values(), digits):
        listed = ", ".join(f"{norm:.6g} on rank {rank}" for rank, norm in sorted(known.items())[:4])
        yield "ranks-differ", f"call {number}: the norm is {listed}"
    coefficients = {r: s.coefficient for r, s in samples.items() if s.coefficient is not None}
    if len(coefficients) > 1 and _apart(coefficients.values(), coarse):
        listed = ", ".join(f"{c:.4g} on rank {rank}" for rank, c in sorted(coefficients.items())[:4])
        yield "ranks-differ", f"call {number}: gradients were multiplied by {listed}"
    if judged.true_norm is not None and not twice:
        for rank, norm in known.items():
            if _apart([norm, judged.true_norm], max(digits, coarse)):
                yield (
                    "norm",
                    f"call {number}: {norm:.6g} where the whole gradient has {judged.true_norm:.6g}"
                    + _why(samples[rank], norm, rank),
                )
    if digits > _CLOSE and judged.norm and judged.true_norm:
        error = abs(judged.norm - judged.true_norm) / judged.true_norm
        yield (
            "digits",
            f"the norm is {one.digits.removeprefix('torch.')}, off by {error:.1%} in call {number}",
        )


class _Counted:
    """The whole gradient, from what each rank holds: each piece once.

    Attributes:
        norm: None where there is no gradient at all.
        unsynchronised: names of parameters that ranks hold the same values of, and other gradients.
        undeclared: of plain ones that ranks hold other values of, or that only some ranks have.
    """

    def __init__(self, samples: dict[int, Sample], p: float) -> None:
        pieces: defaultdict[tuple[Any, ...], dict[int, Part]] = defaultdict(dict)
        for rank, sample in samples.items():
            for key, part in zip(_keys(sample, samples), sample.parts, strict=True):
                pieces[key][rank] = part
        every = [list(by_rank.values()) for by_rank in pieces.values()]
        copies = [all(_near(part.value, parts[0].value) for part in parts) for parts in every]
        self.undeclared = [
            parts[0].name
            for parts, is_copy in zip(every, copies, strict=True)
            if parts[0].piece is None and (not is_copy or len(parts) < len(samples))
        ]
        powers: list[float] = []
        self.unsynchronised: list[str] = []
        for parts, is_copy in zip(every, copies, strict=True):
            differ = any(not _same_gradient(part, parts[0], p) for part in parts)
            # Biases of 0 and scales of 1 are equal on ranks that hold other layers, too.
            is_other = not is_copy or (differ and bool(self.undeclared))
            if differ and not is_other:
                self.unsynchronised.append(parts[0].name)
            powers += [part.power for part in (parts if is_other else parts[:1]) if part.power is not None]
        self.norm = joined(powers, p) if powers else None


def _keys(sample: Sample, samples: dict[int, Sample]) -> list[tuple[Any, ...]]:
    """By which parts are found on other ranks: their places, where all ranks pass lists of the same shapes;
    else their names."""
    shapes = [part.shape for part in sample.parts]
    if all([part.shape for part in other.parts] == shapes for other in samples.values()):
        return [(i, part.piece) for i, part in enumerate(sample.parts)]
    seen: Counter[str] = Counter()
    keys: list[tuple[Any, ...]] = []
    for part in sample.parts:
        keys.append((part.name, seen[part.name], part.shape, part.piece))
        seen[part.name] += 1
    return keys


def _same_gradient(one: Part, other: Part, p: float) -> bool:
    if one.power is None or other.power is None:
        return True  # unused on one of them: zero there
    if not (math.isfinite(one.power) and math.isfinite(other.power)):
        return True
    size = max(one.power, other.power) if math.isinf(p) else max(one.power, other.power) ** (1 / p)
    close = max(_rounding(one.dtype), _CLOSE)
    return abs(one.gradient - other.gradient) <= close * max(size, abs(one.gradient), abs(other.gradient))


def _returned(sample: Sample, samples: dict[int, Sample]) -> float | None:
    """The norm that a rank got, which as a DTensor may lie in parts."""
    if sample.norm is None or not sample.partial_over:
        return sample.norm
    parts = [samples[r].norm for r in sample.partial_over if r in samples]
    if len(parts) < len(sample.partial_over) or any(part is None for part in parts):
        return None
    p = sample.p
    return joined([part if math.isinf(p) else part**p for part in parts if part is not None], p)


def _why(sample: Sample, norm: float, rank: int) -> str:
    own = joined([part.power for part in sample.parts if part.power is not None], sample.p)
    return f" (it is that of what rank {rank} holds)" if not _apart([norm, own]) else ""


# --- all calls of a place -----------------------------------------------------------------------------------


def _habits(
    judged: Judged, place: Place, by_rank: dict[int, Place], notes: Mapping[int, Notes], world_size: int
) -> Iterator[tuple[str, str]]:
    if place.empty == place.calls:
        yield "before-backward", f"no parameter had a gradient in any of {place.calls} calls"
    if place.stale * 2 > place.calls > 1:
        yield "after-step", f"in {place.stale} of {place.calls} calls the optimizer had stepped just before"
    if place.early > 1:
        yield "too-early", f"in {place.early} of {place.calls} calls the gradients had been clipped before"
    if place.exhausted:
        yield "iterator", f"{place.exhausted} of {place.calls} calls got an iterator that was used up"
    if place.nonfinite_steps:
        yield "nonfinite", f"{place.nonfinite_steps} step(s) with a norm that is not finite"
    away = set(range(world_size)) - set(by_rank)
    behind = {r for r, p in by_rank.items() if p.calls < max(q.calls for q in by_rank.values())}
    elsewhere = {r for r in away if r in notes and any(p.calls for p in notes[r].places)}
    if away - elsewhere:
        yield "absent", f"rank(s) {ranks_in_words(away - elsewhere)} never called it"
    elif behind and all(notes[r].ended and not notes[r].joins for r in by_rank):
        yield "absent", f"rank(s) {ranks_in_words(behind)} called it less often than the others"
    yield from _threshold(judged)
    if judged.share > _DEAR and judged.calls > 1:
        yield (
            "cost",
            (
                f"{judged.seconds * 1e3:.2f} ms a call, {judged.share:.0%} of the time; {judged.collectives} "
                f"collective(s) and {judged.syncs} wait(s) of the host a call"
                + ("" if judged.ours is None else f"; distclip's: {judged.ours * 1e3:.2f} ms")
            ),
        )


def _threshold(judged: Judged) -> Iterator[tuple[str, str]]:
    norms = sorted(n if true is None else true for _, n, true in judged.norms)
    norms = [n for n in norms if math.isfinite(n)]
    bound = judged.max_norm
    if len(norms) < _SELDOM or bound is None or not math.isfinite(bound):
        return
    clipped = sum(n > bound for n in norms) / len(norms)
    if not norms[-1] > 0:
        return
    below = f"above what is ordinary in these norms is {suggest_max_norm(torch.tensor(norms)):g}"
    if clipped > _OFTEN:
        yield "always", f"{clipped:.0%} of {len(norms)} calls clip at {bound:g}; {below}"
    elif not clipped:
        yield "never", f"none of {len(norms)} calls clips at {bound:g}; {below}"


def _steppers(notes: Mapping[int, Notes], clips: bool) -> Iterator[Finding]:
    """What optimizers have stepped, on the first rank that has seen it."""
    seen: set[tuple[str, str]] = set()
    for rank, own in sorted(notes.items()):
        for stepper in own.steppers:
            is_muon = "muon" in stepper.optimizer.lower()
            some = f"{stepper.optimizer} steps {stepper.total} parameters"
            found = []
            if clips and stepper.never and len(stepper.never) < stepper.total:
                found.append(("not-clipped", f"{some}, of which {_names(stepper.never)} were never clipped"))
            elif clips and stepper.never and not is_muon:
                found.append(("unclipped-optimizer", f"{some}, none of which was clipped"))
            if stepper.twice:
                found.append(("clipped-twice", f"{_names(stepper.twice)}, stepped by {stepper.optimizer}"))
            if is_muon and stepper.by_norm:
                found.append(("muon", f"{some}, of which {stepper.by_norm} are clipped by norm"))
            if "adafactor" in stepper.optimizer.lower() and stepper.by_norm:
                found.append(
                    ("self-clipping", f"{stepper.optimizer} steps {stepper.by_norm} of these parameters")
                )
            for kind, words in found:
                if (kind, stepper.optimizer) not in seen:
                    seen.add((kind, stepper.optimizer))
                    yield Finding(kind, "", f"{words} (rank {rank})" if len(notes) > 1 else words)


# --- numbers ------------------------------------------------------------------------------------------------


def _near(one: float, other: float) -> bool:
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= 1e-5 * max(abs(one), abs(other))


def _apart(numbers: Iterable[float], close: float = _CLOSE) -> bool:
    """Whether they are not the same, but for rounding. NaN is like NaN."""
    found = list(numbers)
    if any(map(math.isnan, found)):
        return not all(map(math.isnan, found))
    if any(map(math.isinf, found)):
        return len(set(found)) > 1
    return max(found) - min(found) > close * max(map(abs, found))


def _rounding(dtype: str) -> float:
    """How far apart numbers of it may be that were meant to be the same."""
    return {"torch.bfloat16": 2e-2, "torch.float16": 4e-3}.get(dtype, _CLOSE)


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
