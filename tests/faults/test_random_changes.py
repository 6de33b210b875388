"""22–35 at random: any layout, source, entrance and strategy, and changes between the steps.

Every step must end in the float64 norm of the gathered gradient, the same bits on all ranks, and gradients
scaled by what the strategy says of it; or in an error on all ranks. A round is what its seed says:

    DISTCLIP_ROUNDS=1 DISTCLIP_SEED=17 pytest tests/faults/test_random_changes.py

plays round 17 alone, and DISTCLIP_ROUNDS=3000 as many.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import random
import struct
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distclip
from distclip.clipper import clipping_of
from tests.faults.changes import CHANGES, SPOILT
from tests.faults.worlds import SIZE, Net, World, draw, local_of
from tests.harness import Job, RankFailure, on_ranks, pool

ROUNDS = int(os.environ.get("DISTCLIP_ROUNDS", "300"))
SEED = int(os.environ.get("DISTCLIP_SEED", "0"))
IN_A_JOB = 25
UNLAPPED = ["AGC", "Value first"]  # want more than norms
ENTRANCES = ("clip", "clip, overlap", "step", "step, overlap", "function", "total")
ALONE = 0.015  # of the rounds: replicas of which one changes, which the others cannot see
GIVES_UP = 2.0  # seconds that it waits for them

Key = tuple[str, int, tuple[int, ...]]  # the name, the stage, the coordinates of the piece


@dataclass
class Step:
    """What one rank saw.

    Attributes:
        expected: "right", "error", "either", or "alone" where only some replicas have changed.
        ended: "right" or "error", or "crash".
        norm: its bits.
        said: the error, or what was wrong.
    """

    expected: str
    ended: str = "right"
    norm: bytes = b""
    blurred: bool = False
    said: str = ""
    wrong: list[str] = field(default_factory=list)


@dataclass
class Played:
    seed: int
    mates: tuple[int, ...]
    circle: tuple[int, ...]
    words: list[str]
    steps: list[Step]


# --- what must come out -----------------------------------------------------------------------------------


class Oracle:
    """The strategy, written down again: norms of whole gradients in, coefficients by parameter out."""

    def __init__(self, rng: random.Random, entrance: str, source: str, world: World) -> None:
        self.p = rng.choice([1.0, 2.0, 2.0, 2.0, 3.0, math.inf])
        self.bound = rng.choice([0.5, 3.0, 20.0, 200.0])
        kinds = ["GlobalNorm"] * 3 + ["PerParameter", "Percentile", "AdaGC"]
        if source in ("module", "modules") and world.flat is None:
            kinds.append("PerGroup")
        if "overlap" not in entrance:
            kinds += UNLAPPED
        self.kind = "GlobalNorm" if entrance in ("function", "total") else rng.choice(kinds)
        if self.kind in ("AdaGC", "AGC"):
            self.p = 2.0
        self.value = rng.choice([0.3, 1.0])
        self.warmup = rng.choice([0, 1, 3])
        self.seen: list[float] = []
        self.average: dict[tuple[str, int], float] = {}
        self.steps = 0
        self.is_lost = self.is_planned_anew = False

    def strategy(self, *, odd: bool = False) -> distclip.Strategy:
        b, p = self.bound * (2 if odd else 1), self.p
        made: dict[str, Any] = {
            "GlobalNorm": lambda: distclip.GlobalNorm(b, p),
            "PerParameter": lambda: distclip.PerParameter(b, p),
            "PerGroup": lambda: distclip.PerGroup({"*weight*": b, "*": 2 * b}, norm_type=p),
            "Percentile": lambda: distclip.Percentile(
                50, multiplier=1, history=8, warmup=2, initial=b, norm_type=p
            ),
            "AdaGC": lambda: distclip.AdaGC(1.04, beta=0.9, warmup=self.warmup, max_norm=b),
            "Value first": lambda: distclip.Chain(distclip.Value(self.value), distclip.GlobalNorm(b, p)),
            "AGC": lambda: distclip.AGC(0.01 * (2 if odd else 1)),
        }
        return made[self.kind]()

    def joined(self, sums: Sequence[float]) -> float:
        if any(math.isnan(s) for s in sums):
            return math.nan
        return max(sums, default=0.0) if math.isinf(self.p) else math.fsum(sums) ** (1 / self.p)

    def coefficients(self, terms: dict[Key, tuple[float, float]]) -> dict[tuple[str, int], float] | None:
        """By name and stage; None where that is not written down here."""
        total = self.joined([s for s, _ in terms.values()])
        by_name: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
        for (name, stage, _), (s, _) in terms.items():
            by_name[name, stage].append(s)
        norms = {name: self.joined(sums) for name, sums in by_name.items()}
        if self.kind == "AGC" or (self.is_lost and self.kind in ("Percentile", "AdaGC")):
            return None
        if self.kind == "PerParameter":
            return {name: _scale(n, self.bound) for name, n in norms.items()}
        if self.kind == "PerGroup":
            parts: defaultdict[bool, list[float]] = defaultdict(list)
            for (name, _, _), (s, _) in terms.items():
                parts["weight" in name].append(s)
            of = {is_weight: self.joined(sums) for is_weight, sums in parts.items()}
            return {
                (n, s): _scale(of["weight" in n], self.bound * (1 if "weight" in n else 2)) for n, s in norms
            }
        if self.kind == "AdaGC":
            return self._adagc(norms, total)
        bound = self.bound
        if self.kind == "Percentile":
            if total > 0:
                self.seen = [*self.seen, total][-8:]
            bound = float(np.percentile(self.seen, 50)) if len(self.seen) >= 2 else bound
            return dict.fromkeys(norms, _scale_above(total, bound))
        if self.kind == "Value first":
            total = self.joined([s for _, s in terms.values()])
        c = _scale(total, bound)
        return dict.fromkeys(norms, c)

    def _adagc(self, norms: dict[tuple[str, int], float], total: float) -> dict[tuple[str, int], float]:
        if self.is_planned_anew:  # what does not train then is dropped
            self.average = {name: average for name, average in self.average.items() if name in norms}
        together, warming = _scale(total, self.bound), self.steps < self.warmup
        coefficients = {}
        for name, n in norms.items():
            average = self.average.get(name, math.inf)
            bound = self.bound if math.isinf(average) else 1.04 * average
            coefficients[name] = together if warming else _scale_above(n, bound)
            clipped = n * together if warming else min(n, bound)
            if clipped:
                young = warming or math.isinf(average)
                self.average[name] = min(average, clipped) if young else 0.9 * average + 0.1 * clipped
        self.steps += 1
        return coefficients


def _scale(norm: float, bound: float) -> float:
    return min(1.0, bound / (norm + 1e-6))


def _scale_above(norm: float, bound: float) -> float:
    """To what has been learned."""
    return 1.0 if norm <= bound else bound / (norm + min(1e-6, norm / 1000))


# --- one round --------------------------------------------------------------------------------------------


class Round:
    def __init__(self, seed: int, note: Path) -> None:
        self.rng = rng = random.Random(seed)
        self.seed, self.note = seed, note
        note.write_text(f"round {seed}: being laid out")
        self.alone = rng.random() < ALONE
        self.world = world = draw(rng)
        if self.alone:
            torch.manual_seed(seed)
            world = self.world = World("replicas", [Net()])
        self.entrance = rng.choice(ENTRANCES)
        sources = ["module", "modules", "optimizer", "list", "named"]
        self.source_kind = rng.choice(sources if world.flat is None else ["module"])
        self.oracle = Oracle(rng, self.entrance, self.source_kind, world)
        self.policy = rng.choice(["skip", "skip", "raise", "zero", "propagate"])
        if self.entrance.startswith("step") and self.policy == "propagate":
            self.policy = "skip"
        self.odd = rng.choice(list(ODD)) if rng.random() < 0.08 and not self.alone else ""
        self.odd_rank = rng.randrange(SIZE)
        self.is_odd = bool(self.odd) and dist.get_rank() == self.odd_rank
        self.optimizer: Any = None
        if self.source_kind == "optimizer":
            tensors = [p for _, p in world.named()]
            self.optimizer = torch.optim.SGD(tensors, lr=0.0, foreach=False)
            if self.is_odd and self.odd in ("order", "one less"):
                self._spoil_list(self.optimizer.param_groups[0]["params"])
        self.words = [
            f"{world.kind}, {self.source_kind}, {self.entrance}, {self.oracle.kind} p={self.oracle.p:g}, "
            f"on_nonfinite={self.policy}"
        ]
        if self.odd:
            self.words.append(f"{self.odd} on rank {self.odd_rank} is another")
        self.source = self._source()
        self.clipper: distclip.Clipper | None = None
        if self.entrance.startswith(("clip", "step")):
            odd = self.is_odd
            overlap = ("overlap" in self.entrance) != (odd and self.odd == "overlap")
            self.clipper = distclip.Clipper(
                self.source,
                self.oracle.strategy(odd=odd and self.odd == "threshold"),
                on_nonfinite="zero" if odd and self.odd == "policy" else self.policy,  # type: ignore[arg-type]
                overlap=overlap and self.oracle.kind not in UNLAPPED,
                **world.kwargs,
            )
        self.planned: list[tuple[str, Tensor, bool]] | None = None
        self.dtypes: dict[int, torch.dtype] = {}  # by the id of what was planned for
        self.is_unlike = False  # something has been changed on some ranks only
        self.is_pure = self.has_evaluated = False
        self.trained = world.trained
        self.steps: list[Step] = []
        self.circle = world.circle
        self.one: int | None = None  # the only rank that changes by itself, where not all hear of it

    def _source(self) -> Any:
        world = self.world
        if self.source_kind == "optimizer":
            return self.optimizer
        if self.source_kind == "module" and len(world.models) == 1:
            return world.models[0]
        if self.source_kind in ("module", "modules"):
            models = list(world.models)
            if self.is_odd and self.odd == "order":
                models.reverse()
            return models
        named: list[Any] = list(world.named())
        if self.is_odd:
            self._spoil_list(named)
        return named if self.source_kind == "named" else [p for _, p in named]

    def _spoil_list(self, items: list[Any]) -> None:
        if self.odd == "order":
            items.reverse()
        elif self.odd == "one less":
            items.pop(len(items) // 2)

    def listed(self) -> list[tuple[str, Tensor]]:
        """What is to be clipped now, each once."""
        world = self.world
        if self.source_kind == "optimizer":
            groups = enumerate(self.optimizer.param_groups)
            found = [(f"{g}.{i}", p) for g, group in groups for i, p in enumerate(group["params"])]
        elif self.source_kind in ("module", "modules"):
            found = list(world.named())
        else:
            if self.clipper is None:
                self.source = self._source()  # such callers list them anew
            found = [i if isinstance(i, tuple) else (f"[{n}]", i) for n, i in enumerate(self.source)]
        first: dict[int, tuple[str, Tensor]] = {}
        for name, p in found:
            first.setdefault(id(p), (name, p))
        return list(first.values())

    # --- step after step ---

    def play(self) -> Played:
        for _ in range(3 if self.alone else self.rng.randint(2, 6)):
            self._change()
            step = self._step()
            self.steps.append(step)
            failed = torch.tensor([float(step.ended != "right" or bool(step.wrong))])
            dist.all_reduce(failed, op=dist.ReduceOp.MAX)
            if failed.item():
                break
        return Played(self.seed, self.world.mates, self.circle, self.words, self.steps)

    def _change(self) -> None:
        rng, world = self.rng, self.world
        often = rng.choice([0, 0, 1, 1, 2]) if self.steps else int(rng.random() < 0.15)
        for _ in range(int(len(self.steps) == 2) if self.alone else often):  # the third compares nothing
            # DDP takes an evaluation for the last backward pass, until there is another one of its own.
            possible = HARMLESS if self.has_evaluated else CHANGES
            possible = [w for w in possible if CHANGES[w].fits(world, self.optimizer)]
            if self.clipper is None and self.source_kind in ("list", "named"):
                # A drop-in knows a list by its tensors, which such changes replace in sharded stages only.
                unlike = world.kind == "2 stages, one stage sharded"
                possible = [w for w in possible if not (unlike and w in ALL_REPLACED)]
            if self.alone and "module" not in self.source_kind:
                possible = [w for w in possible if w != FROZEN]  # of which a list of the others tells nothing
            words = rng.choice(possible)
            ranks = list(range(SIZE))
            on_some, one = self.alone or rng.random() < 0.15, rng.randrange(SIZE)
            some = rng.sample(ranks, rng.choice([1, 1, 2, 3]))
            own = random.Random(rng.random())
            harmless = words in HARMLESS
            cannot_tell = self.is_pure and self.steps and not self.alone and not harmless
            # A drop-in knows a list by its tensors: where none is left, nothing tells that it was this one.
            # (Nor of stages, whose lists change by themselves.)
            makes_lists = self.clipper is None and self.source_kind in ("list", "named") and self.steps
            if makes_lists and not harmless:
                cannot_tell = cannot_tell or words in ALL_REPLACED or "stages" in world.kwargs
            if on_some and CHANGES[words].some and not cannot_tell:
                # (Where all change to whom a step's message goes, they wait for their copies.)
                is_part = len(world.circle) < len(world.mates)
                if is_part:
                    one = self.one = one if self.one is None else self.one
                if not (words == FROZEN and world.kind == "TP on two ranks each"):  # where it tells as little
                    ranks = [one] if self.alone or is_part else sorted(some)
            self._say(f"{words}" + (f" on rank(s) {ranks}" if len(ranks) < SIZE else ""))
            self.is_unlike = self.is_unlike or (len(ranks) < SIZE and not harmless)
            # What lists hold on of a module is not declared by its name there any more.
            holds_on = bool(world.own) and not harmless and "module" not in self.source_kind
            self.is_unlike = self.is_unlike or holds_on
            if dist.get_rank() in ranks:
                CHANGES[words].run(world, own, self.optimizer)
            if words == FROZEN and world.kind == "DDP on two ranks each":
                self.is_unlike = True  # nothing is left that tells which ranks train together
            if not harmless:
                self.trained = self.trained and world.flat is not None

    def _gradients(self, listed: list[tuple[str, Tensor]]) -> bool:
        """Whether they are this rank's own, because they were not synchronised."""
        rng, world = self.rng, self.world
        everything = {id(p): (n, p) for n, p in world.named()} | {id(p): (name, p) for name, p in listed}
        seed, scale = rng.randrange(1 << 20), rng.choice([0.01, 1.0, 1.0, 30.0])
        apart = rng.random() < (0.25 if world.kind.startswith("DDP") else 0.06)
        without = rng.random() < 0.15
        for _, p in everything.values():
            p.grad = None
        if not self.trained:
            world.fill(list(everything.values()), seed, scale)
        else:
            without = without and "FSDP1" not in world.kind
            apart = apart and world.synchronised
            self._say("backward" + ", without synchronisation" * apart + ", a layer unused" * without)
            with contextlib.ExitStack() as stack:
                for model in world.models if apart else ():
                    if hasattr(model, "set_requires_gradient_sync"):
                        model.set_requires_gradient_sync(False)
                    else:
                        stack.enter_context(model.no_sync())
                world.train(seed, apart=apart, without_body=without)
            on, looks = rng.sample(range(SIZE), rng.choice([1, 2, 4])), rng.random() < 0.15
            if looks and world.kind.startswith("DDP") and not self.alone:
                self._say(f"a forward pass without gradients on rank(s) {sorted(on)}")
                self.has_evaluated = True
                if dist.get_rank() in on:
                    world.evaluate()
            if apart:
                return True
        if rng.random() < 0.35:
            words = rng.choice(list(SPOILT))
            how, number, own_seed = SPOILT[words], rng.randrange(2), rng.random()
            named = {n: p for n, p in everything.values() if p.grad is not None}
            own = random.Random(own_seed)
            if not how.everywhere:
                # Copies stay copies: on all, or where the first axis has that coordinate.
                named = {n: p for n, p in named.items() if (world.piece_of(p) or (number,))[0] == number}
            if words == "sparse gradients" and (self.trained or self.oracle.kind == "AGC"):
                named = {}
            if named or how.everywhere:
                self._say(words + ("" if how.everywhere else f" in pieces {number}"))
            how.run(world, own, named)
        return False

    def _say(self, words: str) -> None:
        self.words.append(words)
        self.note.write_text(f"round {self.seed}: " + "; ".join(self.words))

    def _step(self) -> Step:
        world = self.world
        self._say(f"step {len(self.steps)}")
        listed = self.listed()
        unsynchronised = self._gradients(listed)
        listed = self.listed()
        oracle = self.oracle
        trains = [(n, p) for n, p in listed if p.requires_grad or p.grad is not None]
        state = [(n, p, p.requires_grad or p.grad is not None) for n, p in listed]
        terms: dict[Key, tuple[float, float]] = {}
        for name, p in trains:
            sums = _sums(p.grad, oracle.p, oracle.value)
            terms[name, world.stage, world.piece_of(p)] = sums
        before = [(n, p, None if p.grad is None else _dense(p.grad)) for n, p in trains]
        flat = world.flat is not None
        shapes = [(n, () if flat else tuple(p.shape), len(world.piece_of(p))) for n, p in trains]
        kinds = [str(p.dtype) for _, p in trains]
        converted = any(self.dtypes.get(id(p), p.dtype) != p.dtype for _, p in trains)
        mine = (world.stage, self._has_changed(state), shapes, kinds, terms, converted)
        everyone: list[Any] = [None] * SIZE
        dist.all_gather_object(everyone, mine)
        mates = [everyone[r] for r in world.mates]

        whole, blurred = _join([m[4] for m in mates])
        if unsynchronised:
            blurred = True
        step = Step(self._expected(mates, unsynchronised), blurred=blurred)
        is_changed_alike = all(m[1] or m[5] for m in mates)
        oracle.is_planned_anew = is_changed_alike
        reported: Any = None
        try:
            norm, reported = self._clip(listed)
            step.norm = struct.pack("f", norm.item())
            if type(norm) is not Tensor or norm.dtype != torch.float32 or norm.dim():
                step.wrong.append(f"the norm is {norm!r}")
        except (distclip.DistclipError, ValueError, TypeError) as error:
            step.ended, step.said = "error", f"{type(error).__name__}: {error}"
            if isinstance(error, distclip.NonFiniteError) and step.expected == "right":
                step.expected = "error" if self._is_refused(whole) else "right"
            elif len(str(error)) < 20:
                step.wrong.append(f"the message is {error}")
        except BaseException:
            step.ended, step.said = "crash", traceback.format_exc()
        if step.expected == "either" and (self.is_pure or len(world.circle) < len(world.mates)):
            step.blurred = blurred = True  # copies that nobody compares in this step
        if step.ended == "right" and step.expected == "right" and not blurred:
            if self._is_refused(whole):
                step.wrong.append("on_nonfinite='raise' has not raised")
            self._check(step, whole, before, norm.item(), reported)
        elif step.ended == "right":
            oracle.is_lost = True  # what was learned is not known
        if is_changed_alike and step.ended == "right":
            self.planned, self.dtypes = state, {id(p): p.dtype for _, p in listed}
            world.said.clear()
            self.circle = self._circle()
        # Stages and pieces bring a message in every step.
        self.is_pure = (
            not any(piece for m in mates for _, _, piece in m[4]) and len({m[0] for m in mates}) == 1
        )
        return step

    def _circle(self) -> tuple[int, ...]:
        """The ranks that the message of a step goes to; copies among them may be none of them any more."""
        plan = None if self.clipper is None else clipping_of(self.clipper).parameters.plan
        if plan is None or plan.group is None:
            return self.world.circle
        return tuple(dist.get_process_group_ranks(plan.group))

    def _is_refused(self, whole: dict[Key, tuple[float, float]]) -> bool:
        is_finite = all(math.isfinite(s) for s, _ in whole.values())
        return self.policy == "raise" and not is_finite and self.entrance != "total"

    def _has_changed(self, state: list[tuple[str, Tensor, bool]]) -> bool:
        """What distclip must notice: other tensors, or some that have begun to train, or a declaration."""
        if self.planned is None:
            return True
        said = {
            id(p)
            for item in self.world.said
            for p in ([item] if isinstance(item, Tensor) else item.parameters())
        }
        if not said.isdisjoint(id(p) for _, p, _ in state):
            return True
        names = [(n, id(p)) for n, p, _ in state]
        if names != [(n, id(p)) for n, p, _ in self.planned]:
            return True
        return any(
            p.requires_grad and not t for (_, p, _), (_, _, t) in zip(state, self.planned, strict=True)
        )

    def _expected(self, mates: list[Any], unsynchronised: bool) -> str:
        world = self.world
        by_stage: defaultdict[int, list[Any]] = defaultdict(list)
        for m in mates:
            by_stage[m[0]].append((m[2], m[3]))
        shapes_alike = all(s[0] == first[0][0] for first in by_stage.values() for s in first)
        alike = shapes_alike and all(s == first[0] for first in by_stage.values() for s in first)
        changed = [m[1] for m in mates]
        if unsynchronised:
            return "error"
        if self.odd and self.odd_rank in world.mates and self.planned is None:
            always = {"threshold", "policy", "overlap"}
            if self.entrance in ("function", "total"):
                always = {"threshold"} if self.entrance == "function" else set()
                always |= {"policy"} if self.entrance == "function" and self.policy != "raise" else set()
            if self.oracle.kind in UNLAPPED:
                always -= {"overlap"}
            if self.policy == "zero" and self.clipper is not None:
                always -= {"policy"}
            if self.odd in always:
                return "error"
            return (
                "either" if self.odd in ("order", "one less", "norm_type") else "right" if alike else "either"
            )
        if any(changed) and not all(changed):
            if all(m[1] or m[5] for m in mates):
                return "either"  # all plan anew, some of them for another reason
            return "alone" if self.is_pure else "error"
        if all(changed) and not shapes_alike:
            return "error"
        converted = {m[5] for m in mates}  # of the first parameter it is noticed
        if len(converted) > 1 and self.is_pure:
            return "alone"
        return "right" if alike and len(converted) == 1 and not self.is_unlike else "either"

    def _clip(self, listed: list[tuple[str, Tensor]]) -> tuple[Tensor, Any]:
        kwargs = self.world.kwargs
        if self.clipper is not None and self.entrance.startswith("clip"):
            report = self.clipper.clip()
            return report.total_norm, report
        if self.clipper is not None:
            optimizer = self.optimizer
            if optimizer is None:
                optimizer = torch.optim.SGD([p for _, p in listed], lr=0.0, foreach=False)
            report = self.clipper.step(optimizer)
            return report.total_norm, report
        p = self.oracle.p
        if self.entrance == "total":
            return distclip.total_grad_norm(self.source, p, **kwargs), None
        bound = self.oracle.bound * (2 if self.is_odd and self.odd == "threshold" else 1)
        strict = (self.policy == "raise") or (self.is_odd and self.odd == "policy")
        return distclip.clip_grad_norm_(self.source, bound, p, strict, **kwargs), None

    def _check(self, step: Step, whole: Any, before: list[Any], got: float, report: Any) -> None:
        oracle = self.oracle
        want = oracle.joined([s for s, _ in whole.values()])
        if not math.isfinite(want):
            if math.isfinite(got):
                step.wrong.append(f"norm {got} for {want}")
            if report is not None and not bool(report.nonfinite):
                step.wrong.append("report.nonfinite is false")
            policy = self.policy if report is not None else "propagate"
            if policy in ("skip", "zero") or self.entrance == "total":
                for name, p, g in before:
                    same = torch.zeros_like(g) if policy == "zero" and g is not None else g
                    if g is not None and not torch.equal(
                        _dense(p.grad).nan_to_num(7.0), same.nan_to_num(7.0)
                    ):
                        step.wrong.append(f"the gradient of {name} was changed")
            return
        if not abs(got - want) <= 3e-6 * want:
            step.wrong.append(f"norm {got!r} for {want!r}")
        if report is not None and bool(report.nonfinite):
            step.wrong.append("report.nonfinite is true")
        coefficients = oracle.coefficients(whole)
        for name, p, g in before:
            if g is None:
                if p.grad is not None:
                    step.wrong.append(f"{name} has got a gradient")
                continue
            after = _dense(p.grad)
            if self.entrance == "total":
                expected = g
            elif coefficients is None:
                if bool((after.abs() > g.abs() * (1 + 1e-2)).any()):
                    step.wrong.append(f"the gradient of {name} has grown")
                continue
            else:
                if oracle.kind == "Value first":
                    g = g.clamp(-oracle.value, oracle.value)
                expected = g * coefficients[name, self.world.stage]
            coarse = p.dtype == torch.bfloat16
            if not torch.allclose(after, expected, rtol=2e-2 if coarse else 2e-5, atol=1e-30):
                ratio = (after.norm() / expected.norm()).item()
                step.wrong.append(f"the gradient of {name} is {ratio:.6g} times what it should be")


ODD = {"threshold": "", "policy": "", "overlap": "", "order": "", "one less": ""}
FROZEN = "all frozen, an adapter added"
ALL_REPLACED = {"load_state_dict(assign=True)", "to meta and to_empty", "bfloat16", "float64"}
HARMLESS = ["a new process group", "collected garbage", "the models copied"]


def _dense(gradient: Tensor) -> Tensor:
    local = local_of(gradient).detach()
    local = local.to_dense() if local.layout != torch.strided else local
    return local.double().clone()


def _sums(gradient: Tensor | None, p: float, value: float) -> tuple[float, float]:
    """Σ|g|^p (or the maximum) of this rank's piece, and after clamping."""
    if gradient is None:
        return 0.0, 0.0
    g = _dense(gradient).abs().flatten()
    if not g.numel():
        return 0.0, 0.0
    both = (g, g.clamp(max=value))
    if math.isinf(p):
        return both[0].max().item(), both[1].max().item()
    return both[0].pow(p).sum().item(), both[1].pow(p).sum().item()


def _join(parts: list[dict[Key, tuple[float, float]]]) -> tuple[dict[Key, tuple[float, float]], bool]:
    """Each piece once, and whether copies differ."""
    whole: dict[Key, tuple[float, float]] = {}
    differ = False
    for part in parts:
        for key, sums in part.items():
            known = whole.setdefault(key, sums)[0]
            differ |= (
                known != sums[0]
                and not (math.isnan(known) and math.isnan(sums[0]))
                and not (abs(known - sums[0]) <= 1e-5 * abs(known))
            )
    return whole, differ


@on_ranks(SIZE)
def _rounds(rank: int, seeds: list[int], directory: str) -> list[Played]:
    from distclip.planning import arrival
    from distclip.torch_private import groups

    at_most, patience = groups.timeout_of, arrival.PATIENCE
    torch.autograd.set_multithreading_enabled(False)
    note = Path(directory, str(rank))
    found: list[Played] = []
    for seed in seeds:
        turn = Round(seed, note)
        if turn.alone:
            groups.timeout_of, arrival.PATIENCE = lambda group: GIVES_UP, GIVES_UP / 2
        played = turn.play()
        groups.timeout_of, arrival.PATIENCE = at_most, patience
        found.append(played)
        del turn
        gc.collect()
        if seed == seeds[0]:
            gc.freeze()  # what torch has imported by now need not be looked through every time
        if any(step.ended == "crash" for step in played.steps):
            break
    return found


# --- what the ranks said ------------------------------------------------------------------------------------


def verdict(played: Sequence[Played]) -> Iterator[tuple[str, str]]:
    """Of one round on all ranks: what happened in each step, by the ranks that clip together, and what was
    wrong with it ("" where nothing was)."""
    for mates in {p.mates for p in played}:
        for number in range(min(len(played[r].steps) for r in mates)):
            steps = {r: played[r].steps[number] for r in mates}
            wrong = [f"rank {r}: {w}" for r, s in steps.items() for w in s.wrong]
            failed = {r for r, s in steps.items() if s.ended != "right"}
            expected = steps[mates[0]].expected
            how = "right"
            if expected == "alone":
                how = "only some replicas have changed"
                if not failed:
                    wrong.append("nobody has noticed that some replicas have changed")
                yield how, "; ".join(wrong)
                continue
            if any(s.ended == "crash" for s in steps.values()):
                wrong.append("a crash")
            elif failed and len(failed) < len(mates):
                circles = {played[r].circle for r in failed}
                if failed == {r for circle in circles for r in circle} and expected != "right":
                    how = "an error on all ranks that hold other pieces, not on their copies"
                else:
                    wrong.append(f"an error on ranks {sorted(failed)} of {mates} only")
            elif failed:
                how = steps[mates[0]].said.split(":")[0]
                # What was said of a parameter may not be kept where another takes its place.
                said = steps[mates[0]].said
                is_told = any(w.startswith("declared") for w in played[0].words) and "declare" in said
                # (AGC cannot know along which dim a plain tensor is cut.)
                is_told = is_told or "unit-wise clipping cannot tell" in said
                if expected == "right" and not is_told:
                    wrong.append("an error for no reason")
            else:
                if expected == "error":
                    wrong.append("no error")
                if not steps[mates[0]].blurred and len({s.norm for s in steps.values()}) > 1:
                    norms = [struct.unpack("f", s.norm)[0] for s in steps.values()]
                    if not all(map(math.isnan, norms)):
                        wrong.append(f"other norms on other ranks: {norms}")
            if wrong:
                wrong.append(f"expected: {expected}")
                wrong += [f"rank {r}: {s.ended} {s.said}" for r, s in steps.items() if s.said]
            yield how, "\n    ".join(wrong)


class _Said(list[str]):
    """Said at once, since many rounds take long."""

    def append(self, text: str) -> None:
        print(f"\n{text}\n", flush=True)
        super().append(text)


def play(seeds: Sequence[int], directory: Path) -> tuple[Counter[str], list[str]]:
    """What happened in how many steps, and what was wrong."""
    counts: Counter[str] = Counter()
    wrong = _Said()
    left = list(seeds)
    while left:
        job, left = left[:IN_A_JOB], left[IN_A_JOB:]
        try:
            ranks = pool(SIZE).run(Job(__name__, "_rounds", (job, str(directory)), {}, True), 300.0)
        except RankFailure as failure:
            notes = [(directory / str(r)).read_text() for r in range(SIZE)]
            wrong.append("a hang\n    " + "\n    ".join(notes) + f"\n{str(failure)[-3000:]}")
            counts["hang"] += 1
            at = job.index(int(notes[0].split(":")[0].split()[1]))
            left = job[at + 1 :] + left
            continue
        done = len(ranks[0])
        counts["rounds"] += done
        for number in range(done):
            played = [r[number] for r in ranks]
            for how, what in verdict(played):
                counts["steps"] += 1
                counts[how] += 1
                if what:
                    counts["wrong"] += 1
                    words = "; ".join(played[0].words)
                    wrong.append(f"round {played[0].seed}: {words}\n    {what}")
        print(f"round {job[done - 1]}: {dict(counts)}", flush=True)
        if done < len(job) or any(s.ended == "crash" for r in ranks for s in r[-1].steps):
            pool(SIZE).kill()
            left = job[done:] + left
    return counts, wrong


@pytest.mark.distributed
@pytest.mark.timeout(3600)
def test_random_changes(tmp_path: Path) -> None:
    counts, wrong = play(range(SEED, SEED + ROUNDS), tmp_path)
    assert not wrong, f"{len(wrong)} of {dict(counts)}\n" + "\n\n".join(wrong[:8])
    assert counts["rounds"] == ROUNDS
    assert ROUNDS < 100 or counts["right"] > counts["steps"] // 2
