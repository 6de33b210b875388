"""From the notes of all ranks to findings. Pure: the same notes, the same judgement."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distclip.audit.exchange import ranks_in_words
from distclip.audit.finding import Finding
from distclip.audit.note import Notes, Part, Place, Sample, joined

_CLOSE = 1e-3  # relative: what is further apart is another number
_OFTEN, _SELDOM = 0.95, 20  # clipped in more than that; never in so many
_DEAR = 0.05  # of the time


@dataclass
class Judged:
    """One place.

    Attributes:
        norm, true_norm: of the latest call that was looked into; None where there is none, or none is known.
        norms: by call, what was returned to rank 0, and the norm of the whole gradient where it is known.
        seconds: a call; ``share``: of the time of the script. ``collectives``, ``syncs``: a call.
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
    share: float = 0.0
    collectives: int = 0
    syncs: int = 0
    findings: list[Finding] = field(default_factory=list)


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
    if late and calls:
        general.append(Finding("unfinished", "", f"rank(s) {ranks_in_words(late)} did not come to an end"))
    if not calls:
        general.append(Finding("no-call", "", "no call that clips was seen"))
    found = [f for call in calls for f in call.findings] + general
    doubtful = {"ownership", "no-call"} & {f.kind for f in found}
    verdict = "wrong" if any(f.severity == "wrong" for f in found) else "unknown" if doubtful else "right"
    count = sum(place.calls for place in first.places)
    troubles = [f"rank {rank}: {text}" for rank, own in notes.items() for text in own.troubles]
    return Judgement(verdict, world_size, calls, general, first.overhead / max(count, 1), troubles)


def _judge_place(by_rank: dict[int, Place], notes: Mapping[int, Notes], world_size: int) -> Judged:
    first_rank = min(by_rank)
    place = by_rank[first_rank]
    seconds = place.seconds / max(place.timed, 1)
    script = notes[first_rank].seconds - notes[first_rank].overhead
    share = seconds * place.calls / script if script > 0 else 0.0
    judged = Judged(
        place.function, place.where, place.calls, tuple(sorted(by_rank)), seconds=seconds, share=share
    )
    found: dict[str, Finding] = {}  # the first of each kind
    calls: defaultdict[int, dict[int, Sample]] = defaultdict(dict)
    for rank, own in by_rank.items():
        for sample in own.samples:
            calls[sample.call][rank] = sample
    for number, samples in sorted(calls.items()):
        for kind, seen in _judge_call(judged, number, samples, len(by_rank), place.kind):
            found.setdefault(kind, Finding(kind, place.where, seen))
    if "not-synchronised" in found:  # the rest follows from it
        for kind in ("ranks-differ", "norm", "ownership"):
            found.pop(kind, None)
    if "ranks-differ" not in found and "norm" not in found and judged.true_norm is not None:
        found.pop("ownership", None)  # the script counts as they lie
    for kind, seen in _habits(judged, place, by_rank, notes, world_size):
        found.setdefault(kind, Finding(kind, place.where, seen))
    judged.findings = list(found.values())
    return judged


# --- one call on all ranks ----------------------------------------------------------------------------------


def _judge_call(
    judged: Judged, number: int, samples: dict[int, Sample], ranks: int, kind: str
) -> Iterator[tuple[str, str]]:
    one = next(iter(samples.values()))
    judged.max_norm = one.max_norm
    judged.collectives = max(judged.collectives, one.collectives)
    judged.syncs = max(judged.syncs, one.syncs)
    if any(s.scaled for s in samples.values()):
        yield (
            "scaled",
            f"call {number}: a GradScaler has scaled the loss, and nobody has unscaled the gradients",
        )
    twice = sorted({part.name for s in samples.values() for part in s.parts if part.times > 1})
    if twice:
        yield "listed-twice", f"{_names(twice)} in the list more than once"
    if len(samples) < ranks:
        return  # of some ranks this call is not known
    counted = _Counted(samples, one.p)
    if counted.unsynchronised:
        yield (
            "not-synchronised",
            (
                f"call {number}: {_names(counted.unsynchronised)} have the same values on all ranks, and "
                "other gradients"
            ),
        )
    returned = {rank: _returned(sample, samples) for rank, sample in samples.items()}
    known = {rank: norm for rank, norm in returned.items() if norm is not None}
    if known:
        judged.norm = known[min(known)]
        judged.true_norm = None if counted.unsynchronised or kind == "scale" else counted.norm
        judged.norms.append((number, judged.norm, judged.true_norm))
    if len(known) > 1 and _apart(known.values()):
        listed = ", ".join(f"{norm:.6g} on rank {rank}" for rank, norm in sorted(known.items())[:4])
        yield "ranks-differ", f"call {number}: the norm is {listed}"
    coefficients = {r: s.coefficient for r, s in samples.items() if s.coefficient is not None}
    if len(coefficients) > 1 and _apart(coefficients.values()):
        listed = ", ".join(f"{c:.4g} on rank {rank}" for rank, c in sorted(coefficients.items())[:4])
        yield "ranks-differ", f"call {number}: gradients were multiplied by {listed}"
    if counted.undeclared:
        yield "ownership", f"{_names(counted.undeclared)}: plain tensors that are not the same on every rank"
    if judged.true_norm is not None and not twice:
        for rank, norm in known.items():
            if _apart([norm, judged.true_norm]):
                yield (
                    "norm",
                    (
                        f"call {number}: {norm:.6g} where the whole gradient has {judged.true_norm:.6g}"
                        + _why(samples[rank], norm, rank)
                    ),
                )
    if one.digits in ("torch.bfloat16", "torch.float16") and judged.norm and judged.true_norm:
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
            for part in sample.parts:
                pieces[part.name, part.shape, part.piece][rank] = part
        powers: list[float] = []
        self.unsynchronised: list[str] = []
        self.undeclared: list[str] = []
        for (name, _, piece), by_rank in pieces.items():
            parts = list(by_rank.values())
            alike = [p for p in parts if _near(p.value, parts[0].value)]
            is_copy = len(alike) == len(parts)
            if piece is None and (not is_copy or (len(parts) < len(samples) and len(samples) > 1)):
                self.undeclared.append(name)
            if is_copy and any(not _same_gradient(part, parts[0], p) for part in parts):
                self.unsynchronised.append(name)
            distinct = parts[:1] if is_copy else parts
            powers += [part.power for part in distinct if part.power is not None]
        self.norm = joined(powers, p) if powers else None


def _same_gradient(one: Part, other: Part, p: float) -> bool:
    if one.power is None or other.power is None:
        return True  # unused on one of them: zero there
    if not (math.isfinite(one.power) and math.isfinite(other.power)):
        return True
    size = max(one.power, other.power) if math.isinf(p) else max(one.power, other.power) ** (1 / p)
    return abs(one.gradient - other.gradient) <= _CLOSE * max(size, abs(one.gradient), abs(other.gradient))


def _returned(sample: Sample, samples: dict[int, Sample]) -> float | None:
    """The norm that a rank got, which as a DTensor may lie in parts."""
    if sample.norm is None or not sample.partial_over:
        return sample.norm
    parts = [samples[r].norm for r in sample.partial_over if r in samples]
    if len(parts) < len(sample.partial_over) or any(part is None for part in parts):
        return None
    return joined(
        [part if math.isinf(sample.p) else part**sample.p for part in parts if part is not None], sample.p
    )


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
    elif behind and all(notes[r].ended for r in by_rank):
        yield "absent", f"rank(s) {ranks_in_words(behind)} called it less often than the others"
    yield from _threshold(judged)
    if judged.share > _DEAR and judged.calls > 1:
        yield (
            "cost",
            (
                f"{judged.seconds * 1e3:.2f} ms a call, {judged.share:.0%} of the time; {judged.collectives} "
                f"collective(s) and {judged.syncs} wait(s) of the host a call"
            ),
        )


def _threshold(judged: Judged) -> Iterator[tuple[str, str]]:
    norms = sorted(n if true is None else true for _, n, true in judged.norms)
    norms = [n for n in norms if math.isfinite(n)]
    bound = judged.max_norm
    if len(norms) < _SELDOM or bound is None or not math.isfinite(bound):
        return
    clipped = sum(n > bound for n in norms) / len(norms)
    below = f"90 % of the norms are below {norms[int(0.9 * (len(norms) - 1))]:.3g}"
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
            if clips and stepper.never and not (is_muon and len(stepper.never) == stepper.total):
                found.append(("not-clipped", f"{some}, of which {_names(stepper.never)} were never clipped"))
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


def _apart(numbers: Iterable[float]) -> bool:
    """Whether they are not the same, but for rounding. NaN is like NaN."""
    found = list(numbers)
    if any(map(math.isnan, found)):
        return not all(map(math.isnan, found))
    if any(map(math.isinf, found)):
        return len(set(found)) > 1
    return max(found) - min(found) > _CLOSE * max(map(abs, found))


def _names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if names[3:] else "")
