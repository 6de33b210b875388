"""What one rank has noted of its calls, in numbers that travel as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass
class Part:
    """What one rank holds of the gradient of one parameter, in one call.

    Attributes:
        name: in the model that it is in, if it is in one.
        shape: of the whole parameter.
        piece: which part of it, by the rank's coordinates along the axes that it is cut along; None where the
            parameter does not tell (a plain tensor).
        power: Σ|g|^p of this part, max|g| for p = ∞; None where there is no gradient.
        gradient, value: fingerprints, equal where the numbers are.
        dtype: of the gradient, or of the parameter where there is none.
        times: how often the call was given it.
    """

    name: str
    shape: tuple[int, ...]
    piece: tuple[int, ...] | None
    power: float | None
    gradient: float
    value: float
    dtype: str
    times: int = 1


@dataclass
class Sample:
    """One call that was looked into.

    Attributes:
        call: the how manieth at its place, from 0.
        max_norm, p: as called; None where the function has none.
        norm: what it returned, None if nothing. ``partial_over``: the ranks whose ``norm`` are powers apart
            of one (a DTensor that has not been reduced).
        coefficient: by what it has multiplied the gradients of this rank; None where they are all zero.
        digits: the dtype of what it returned.
        parts: by parameter.
        scaled: whether a loss scale is still in them, as far as the scalers tell.
        collectives, syncs: what the call started and waited for.
    """

    call: int
    max_norm: float | None
    p: float
    norm: float | None
    partial_over: tuple[int, ...]
    coefficient: float | None
    digits: str
    parts: list[Part]
    scaled: bool = False
    collectives: int = 0
    syncs: int = 0

    @staticmethod
    def from_dict(made: Mapping[str, Any]) -> Sample:
        parts = [
            Part(
                **{
                    **p,
                    "shape": tuple(p["shape"]),
                    "piece": None if p["piece"] is None else tuple(p["piece"]),
                }
            )
            for p in made["parts"]
        ]
        return Sample(**{**made, "parts": parts, "partial_over": tuple(made["partial_over"])})


@dataclass
class Place:
    """One line of the script that calls one function.

    Attributes:
        kind: that of the function.
        calls: how often. ``timed`` of them took ``seconds``, without what the audit adds.
        ours: seconds of distclip for the gradients of one of them; None if that was not measured.
        empty: how often without any gradient. ``stale``: with gradients that a step has used already.
        early: how often again before a step.
        listed_twice, exhausted: names that a call was given twice; calls that were given an iterator that had
            been used up.
        nonfinite_steps: of those that followed, with a norm that was not finite and gradients that were not.
    """

    function: str
    where: str
    kind: str = "norm"
    calls: int = 0
    timed: int = 0
    seconds: float = 0.0
    ours: float | None = None
    empty: int = 0
    stale: int = 0
    early: int = 0
    exhausted: int = 0
    nonfinite_steps: int = 0
    samples: list[Sample] = field(default_factory=list)


@dataclass
class Stepped:
    """What an optimizer has stepped.

    Attributes:
        optimizer: its class.
        never: names of parameters that no call has clipped. ``total``: how many it has stepped.
        twice: of those that two calls by norm have had in one step.
        by_norm: of those that a call by norm has had.
    """

    optimizer: str
    steps: int = 0
    total: int = 0
    never: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    by_norm: int = 0


@dataclass
class Notes:
    """All that one rank has noted.

    Attributes:
        nonfinite: names of parameters that hold NaN or infinity at the end.
        joins: whether DDP lets ranks be absent, as torch's ``Join`` does.
        overhead: seconds that the audit itself took.
    """

    rank: int
    world_size: int
    places: list[Place] = field(default_factory=list)
    steppers: list[Stepped] = field(default_factory=list)
    nonfinite: list[str] = field(default_factory=list)
    joins: bool = False
    backwards: int = 0
    overhead: float = 0.0
    seconds: float = 0.0
    ended: bool = False
    troubles: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Without the samples, which travel one by one."""
        places = [replace(place, samples=[]) for place in self.places]
        return json.dumps(asdict(replace(self, places=places)))

    @staticmethod
    def from_json(text: str) -> Notes:
        made: dict[str, Any] = json.loads(text)
        places = [Place(**place) for place in made.pop("places")]
        return Notes(**{**made, "places": places, "steppers": [Stepped(**s) for s in made["steppers"]]})


def joined(powers: Iterable[float], p: float) -> float:
    """The p-norm from Σ|g|^p of its parts (for p = ∞ from their maxima)."""
    found = list(powers)
    if any(map(math.isnan, found)):
        return math.nan
    if math.isinf(p):
        return max(found, default=0.0)
    return math.fsum(found) ** (1 / p) if all(map(math.isfinite, found)) else math.inf
