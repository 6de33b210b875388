"""31: sparse gradients under ``overlap=True``, measured after backward, beside dense ones that are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

import distclip
from tests import oracle
from tests.harness import on_ranks

BOUND = 0.1


class Words(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        bag = kind == "bag"
        self.embed: Any = (nn.EmbeddingBag if bag else nn.Embedding)(10, 4, sparse=True)
        self.head = nn.Linear(4, 4) if kind not in ("alone", "tied") else None  # DDP waits for what is unused
        self.kind = kind
        self.skips = False

    def forward(self, words: Tensor) -> Tensor:
        if self.skips:
            return self.head(torch.ones(3, 4))  # type: ignore[misc]
        x = self.embed(words.view(1, -1) if self.kind == "bag" else words)
        if self.kind == "twice":
            x = x + self.embed(words + 1)
        if self.kind == "tied":
            return x @ self.embed.weight.detach().T
        return x if self.head is None else self.head(x)


KINDS = ["plain", "bag", "alone", "twice", "tied"]


def words(step: int, rank: int) -> Tensor:
    """Some of them several times."""
    return torch.tensor([1, 2, 2, (3 + step) % 8, (5 + 3 * rank) % 8])


def plain(model: Any, step: int, rank: int) -> None:
    model.zero_grad()
    model(words(step, rank)).square().sum().mul(5.0).backward()


def never_zeroed(model: Any, step: int, rank: int) -> None:
    model(words(step, rank)).square().sum().mul(5.0).backward()


def in_place_zeros(model: Any, step: int, rank: int) -> None:
    model.zero_grad(set_to_none=False)
    model(words(step, rank)).square().sum().mul(5.0).backward()


def in_turn(model: Any, step: int, rank: int) -> None:
    getattr(model, "module", model).skips = bool(step % 2)
    plain(model, step, rank)


def coalesced_by_hand(model: Any, step: int, rank: int) -> None:
    plain(model, step, rank)
    weight = getattr(model, "module", model).embed.weight
    weight.grad = weight.grad.coalesce() if step % 2 else weight.grad.to_dense()


PROGRAMS: dict[str, Callable[[Any, int, int], None]] = {
    f.__name__: f for f in (plain, never_zeroed, in_place_zeros, in_turn, coalesced_by_hand)
}


def compare(make: Callable[[], Any], program: str, rank: int) -> list[float]:
    models = [make(), make()]
    clippers = [
        distclip.Clipper(m, distclip.GlobalNorm(BOUND), overlap=overlap)
        for m, overlap in zip(models, (False, True), strict=True)
    ]
    norms = []
    for step in range(4):
        for model in models:
            PROGRAMS[program](model, step, rank)
        want = oracle.norm(oracle.dense_gradients(models[1].parameters()))
        usual, early = (c.clip().total_norm.item() for c in clippers)
        assert early == pytest.approx(want, rel=1e-5), step
        assert early == pytest.approx(usual, rel=1e-6)
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(oracle.dense(a.grad), oracle.dense(b.grad), rtol=1e-5, atol=1e-9)
        norms.append(early)
    assert max(norms) > 4 * BOUND
    return norms


def makes_sense(kind: str, program: str) -> bool:
    return program != "in_turn" or kind not in ("alone", "tied")


ROWS = [(kind, program) for kind in KINDS for program in PROGRAMS if makes_sense(kind, program)]


@pytest.mark.parametrize(("kind", "program"), ROWS)
def test_31_in_one_process(kind: str, program: str) -> None:
    compare(lambda: Words(kind), program, 0)


UNDER_DDP = [row for row in ROWS if row[1] != "in_turn"]  # which DDP cannot do


@pytest.mark.parametrize("options", [{}, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-4}], ids=str)
@pytest.mark.parametrize(("kind", "program"), UNDER_DDP)
@on_ranks(2)
def test_31_under_ddp(rank: int, kind: str, program: str, options: dict[str, Any]) -> list[float]:
    return compare(lambda: DDP(Words(kind), **options), program, rank)
