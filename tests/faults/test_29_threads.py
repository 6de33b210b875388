"""29: threads that clip each its own model, or measure one model together, do not disturb each other."""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import distclip
from tests.starting import python

THREADS, ROUNDS = 6, 25


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def parameters(k: int, factor: float = 1.0) -> list[nn.Parameter]:
    """All threads have the same shapes: what is kept by shape is common to them."""
    ps = [nn.Parameter(torch.zeros(5, 3)), nn.Parameter(torch.zeros(4))]
    for p in ps:
        p.grad = torch.full_like(p, factor * (k + 1))
    return ps


def want(k: int, factor: float = 1.0) -> float:
    return factor * (k + 1) * math.sqrt(19)


def together(work: Callable[[int], None], threads: int = THREADS) -> None:
    """``work(k)`` in as many threads at once; what any of them raises is raised here."""
    errors: list[BaseException] = []
    begin = threading.Barrier(threads)

    def run(k: int) -> None:
        try:
            begin.wait(60)
            work(k)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(k,)) for k in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(120)
    assert not any(thread.is_alive() for thread in running)
    if errors:
        raise errors[0]


def clip_grad_norm(k: int) -> None:
    for i in range(ROUNDS):
        ps = parameters(k, 1.0 + i)
        assert distclip.clip_grad_norm_(ps, 1.0).item() == pytest.approx(want(k, 1.0 + i))
        assert distclip.total_grad_norm(ps).item() == pytest.approx(1.0, rel=1e-4)


def the_same_list(k: int) -> None:
    ps = parameters(k)
    for i in range(ROUNDS):
        for p in ps:
            p.grad = torch.full_like(p, (1.0 + i) * (k + 1))
        assert distclip.clip_grad_norm_(ps, 1.0).item() == pytest.approx(want(k, 1.0 + i))


def given_norms(k: int) -> None:
    for i in range(ROUNDS):
        ps = parameters(k, 1.0 + i)
        norm = distclip.get_total_norm([p.grad for p in ps if p.grad is not None], 2.0)
        assert norm.item() == pytest.approx(want(k, 1.0 + i))
        distclip.clip_grads_with_norm_(ps, 1.0, norm)
        distclip.clip_grad_value_(ps, 100.0)
        assert distclip.total_grad_norm(ps).item() == pytest.approx(1.0, rel=1e-4)


def clippers(k: int) -> None:
    for strategy in (
        distclip.GlobalNorm(1.0),
        distclip.AdaGC(warmup=2),
        distclip.AGC(0.01),
        distclip.ZClip(warmup=3),
    ):
        ps = parameters(k)
        clipper = distclip.Clipper(ps, strategy)
        for _ in range(5):
            for p in ps:
                p.grad = torch.full_like(p, k + 1.0)
            assert clipper.clip().total_norm.item() == pytest.approx(want(k))


def steps(k: int) -> None:
    for _ in range(6):
        ps = parameters(k)
        optimizer = torch.optim.SGD(ps, lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        clipper = distclip.Clipper(ps, distclip.GlobalNorm(1.0), overlap=k % 2 == 0)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum((p * (k + 1.0)).sum() for p in ps)
            assert isinstance(loss, Tensor)
            scaler.scale(loss).backward()
            assert clipper.step(optimizer, scaler).total_norm.item() == pytest.approx(want(k))


def hooks(k: int) -> None:
    for _ in range(6):
        ps = parameters(k)
        for p in ps:
            p.grad = None
        with distclip.hooks.clip_norm(ps, 1.0, when="accumulated"):
            torch.autograd.backward([(p * (k + 1.0)).sum() for p in ps])
        assert [p.grad.norm().item() for p in ps if p.grad is not None] == pytest.approx([1.0, 1.0], rel=1e-4)


@pytest.mark.parametrize("work", [clip_grad_norm, the_same_list, given_norms, clippers, steps, hooks])
def test_29_each_its_own(work: Callable[[int], None]) -> None:
    together(work)


def test_29_everything_at_once() -> None:
    kinds = [clip_grad_norm, given_norms, clippers, steps, hooks, the_same_list]
    together(lambda k: kinds[k % len(kinds)](k))


def test_29_one_model_for_all() -> None:
    """Who only reads: a thread that logs norms beside the one that trains."""
    ps = parameters(0)
    for round_ in range(8):
        gradient = [torch.full_like(p, 1.0 + round_) for p in ps]
        for p, g in zip(ps, gradient, strict=True):
            p.grad = g

        def read(k: int, factor: float = 1.0 + round_) -> None:
            for p in (2.0, 3.0):
                norm = distclip.total_grad_norm(ps, p)
                assert norm.item() == pytest.approx(factor * 19 ** (1 / p))
                assert distclip.clip_grad_norm_(ps, 1e9 if k else math.inf, p).item() == pytest.approx(
                    norm.item()
                )

        together(read)


def test_29_gradients_of_one_shape() -> None:
    """What is known of them by their shape alone, each thread has for itself."""
    from distclip.current import known

    found = []
    together(lambda k: found.append(known.set_like(list(parameters(k)), 2.0, None)), 3)
    assert len(set(map(id, found))) == 3


def test_29_what_threads_leave_behind() -> None:
    """Nothing that is kept grows with the number of threads that there have been."""
    from distclip.current import known

    before = len(known._known)
    for _ in range(4):
        together(given_norms, 2)
    import gc

    gc.collect()
    ps = parameters(0)
    distclip.clip_grad_norm_(ps, 1.0)
    assert len(known._known) <= before + 4 * 2 * ROUNDS * 2 + 1


FORKS = """
import os, sys
import torch
import distclip
from distclip.current import known
from tests.faults.test_29_threads import parameters, want

ps = parameters(0)
clipper = distclip.Clipper(parameters(1), distclip.GlobalNorm(1.0))
distclip.clip_grad_norm_(ps, 1e9)
with known._lock:
    child = os.fork()
    if not child:
        code = 1
        try:
            norms = [distclip.clip_grad_norm_(ps, 1e9), distclip.total_grad_norm(parameters(2))]
            norms.append(clipper.clip().total_norm)
            code = int([round(n.item(), 3) for n in norms] != [round(want(k), 3) for k in (0, 2, 1)])
        finally:
            os._exit(code)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_29_a_forked_process_goes_on() -> None:
    """Also where another thread was planning at that moment. (In a process of its own, without the threads
    of other tests.)"""
    python("-c", FORKS)
