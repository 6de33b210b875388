"""The kernels in Triton on a device: what they compute there, that nothing waits, CUDA graphs, bandwidth."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median

import pytest
import torch
from torch import Tensor, nn

import distclip
from distclip import kernels
from distclip.kernels import foreach, triton

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One layer of Llama-7B, and what else there is of sizes: norms, biases, odd ends.
SIZES = [4096 * 4096] * 4 + [4096 * 11008] * 3 + [4096] * 2 + [32000, 1, 3, 1023, 4097, 131_075]


@pytest.fixture(scope="module", autouse=True)
def in_triton() -> None:
    assert kernels.goes_to_triton(torch.ones(1, device="cuda")), "the other tests would say nothing"


@pytest.fixture
def no_sync() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


def randn(sizes: list[int], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(n, device="cuda", generator=generator).to(dtype) for n in sizes]


def exact(tensor: Tensor, p: float) -> float:
    magnitude = tensor.double().abs()
    return (magnitude.max() if math.isinf(p) else magnitude.pow(p).sum()).item()


def close(tensors: list[Tensor], p: float) -> object:
    return pytest.approx([exact(t, p) for t in tensors], rel=1e-6 * (1 if math.isinf(p) else p))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums(p: float, dtype: torch.dtype) -> None:
    tensors = randn(SIZES, dtype)
    sums = kernels.power_sums(tensors, p, torch.float32)
    assert (sums.dtype, sums.device) == (torch.float64, tensors[0].device)
    assert sums.tolist() == close(tensors, p)
    assert torch.equal(sums, kernels.power_sums([t.clone() for t in tensors], p, torch.float32))
    torch.testing.assert_close(sums, foreach.power_sums(tensors, p, torch.float32), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(dtype: torch.dtype) -> None:
    """A wide load from such an address would be an error of the device."""
    base = torch.full((3_000_000,), math.nan, dtype=dtype, device="cuda")
    for first in range(1, 9):
        view = base[first : first + 1_000_003]
        copy = torch.randn(view.shape, device="cuda").to(dtype)
        view.copy_(copy)
        for p in NORM_TYPES:
            sums = [kernels.power_sums([t], p, torch.float32) for t in (view, copy)]
            assert sums[0].tolist() == close([copy], p)
            assert torch.equal(*sums)
        kernels.scale_([view], torch.tensor(0.3, device="cuda"))
        assert torch.equal(view, (copy.float() * torch.tensor(0.3, device="cuda")).to(dtype))
        view.fill_(math.nan)
    assert base.isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite(bad: float, dtype: torch.dtype) -> None:
    for p in NORM_TYPES:
        for position in (0, 70_000, 99_999):
            tensors = randn([100_000, 5], dtype)
            tensors[0][position] = bad
            first, second = kernels.power_sums(tensors, p, torch.float32).tolist()
            assert math.isnan(first) if math.isnan(bad) else first == math.inf
            assert second == pytest.approx(exact(tensors[1], p), rel=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficient", [0.34567, 1e-5, 0.0, math.inf, math.nan])
def test_scaling_is_float32_and_rounded_once(dtype: torch.dtype, coefficient: float) -> None:
    tensors = [*randn(SIZES, dtype), torch.tensor([math.nan, -0.0, 6e-8, 1e-40], device="cuda").to(dtype)]
    c = torch.tensor(coefficient, device="cuda")
    want = [(t.float() * c).to(dtype) for t in tensors]
    each = [t.clone() for t in tensors]
    coefficients = torch.where(torch.arange(len(each), device="cuda") % 2 == 0, c, 1.0)
    want_each = [w if i % 2 == 0 else t.clone() for i, (t, w) in enumerate(zip(tensors, want, strict=True))]
    kernels.scale_(tensors, c)
    kernels.scale_each_(each, coefficients)
    for got, wanted in zip(tensors + each, want + want_each, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(bits(got)[~got.isnan()], bits(wanted)[~got.isnan()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_foreach_rounds_once_too(dtype: torch.dtype) -> None:
    tensors = [*randn(SIZES, dtype), torch.randn((), device="cuda").to(dtype)]
    c = torch.tensor(0.34567, device="cuda")
    want = [(t.float() * c).to(dtype) for t in tensors]
    each = [t.clone() for t in tensors]
    foreach.scale_(tensors, c)
    foreach.scale_each_(each, c.repeat(len(each)))
    for got, other, wanted in zip(tensors, each, want, strict=True):
        assert torch.equal(got, wanted)
        assert torch.equal(other, wanted)


def test_float32_scaling_is_that_of_foreach() -> None:
    ours, theirs = randn(SIZES, torch.float32), randn(SIZES, torch.float32)
    c = torch.tensor(0.34567, device="cuda")
    kernels.scale_(ours, c)
    foreach.scale_(theirs, c)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coefficient_of_one_touches_nothing(dtype: torch.dtype) -> None:
    """Not even a signalling NaN, which a multiplication by 1 would change."""
    (g,) = randn([1_000_003], dtype)
    bits(g)[5] = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[dtype]
    g[6] = -0.0
    before = bits(g).clone()
    kernels.scale_([g], torch.ones((), device="cuda"))
    kernels.scale_each_([g], torch.ones(1, device="cuda"))
    assert torch.equal(bits(g), before)


def test_nothing_waits(no_sync: None) -> None:
    """Also where the gradients have moved, and where they are others than before."""
    sets = [randn([5, 70_000, 3], torch.float32, seed) for seed in range(5)]
    others = randn([5, 70_000], torch.bfloat16)
    c = torch.tensor(0.5, device="cuda")
    kernels.power_sums(sets[0], 2.0, torch.float32)
    kernels.power_sums(others, 2.0, torch.float32)
    kernels.scale_(sets[0], c)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    for tensors in [*sets, others[:1], others[1:], others]:
        kernels.power_sums(tensors, 2.0, torch.float32)
        kernels.scale_(tensors, c)
        kernels.scale_each_(tensors, c.expand(len(tensors)))


def test_tables_wait_for_the_device_that_reads_them() -> None:
    """The host runs far ahead, and makes a table for each of many sets of gradients: none may overwrite
    another that has not been read yet."""
    sizes = [1000 + i for i in range(50)]
    sets = [randn(sizes, torch.float32, seed) for seed in range(40)]
    want = [foreach.power_sums(tensors, 2.0, torch.float32) for tensors in sets]
    kernels.power_sums(sets[0], 2.0, torch.float32)
    torch.cuda.synchronize()
    torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
    sums = [kernels.power_sums(tensors, 2.0, torch.float32) for tensors in sets]
    for got, wanted in zip(sums, want, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=0)


def test_on_another_stream() -> None:
    tensors = randn([70_000, 5], torch.float32)
    want = [exact(t, 2.0) for t in tensors]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)  # what is enqueued here next comes late
    kernels.power_sums(tensors, 2.0, torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sums = kernels.power_sums(tensors, 2.0, torch.float32)
    stream.synchronize()
    assert sums.tolist() == pytest.approx(want, rel=1e-6)


def test_on_every_device_whichever_is_current() -> None:
    for i in range(torch.cuda.device_count()):
        g = torch.full((5000,), 2.0, device=f"cuda:{i}")
        assert kernels.power_sums([g], 2.0, torch.float32).tolist() == [20_000.0]
        kernels.scale_([g], torch.tensor(0.5, device=g.device))
        assert g.eq(1).all()


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 3000), nn.GELU(), nn.LayerNorm(3000), nn.Linear(3000, 70)).cuda()


def _churn() -> None:
    """Use every bit of memory that is free to be used, and forget every table."""
    triton._layouts.clear()
    gc.collect()
    for size in (1, 100, 10_000, 1_000_000):
        junk = [torch.full((size,), -1, dtype=torch.int64, device="cuda") for _ in range(50)]
        del junk
    torch.cuda.synchronize()


def test_clip_in_a_graph() -> None:
    """Captured once with gradients that stay where they are; replayed with other values in them."""
    model = _model()
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.zeros_like(p)
    clipper = distclip.Clipper(model, distclip.GlobalNorm(1.0))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(9):  # the tenth report would have been looked at
            clipper.clip()
    torch.cuda.current_stream().wait_stream(stream)
    graph, kept = torch.cuda.CUDAGraph(), len(triton._captured)
    with torch.cuda.graph(graph):
        report = clipper.clip()
    assert len(triton._captured) > kept  # Triton's kernels, not foreach operators
    _churn()
    for size in (10.0, 0.001, 1.0):
        values = [torch.randn_like(p) * size / math.sqrt(p.numel()) for p in parameters]
        for p, v in zip(parameters, values, strict=True):
            p.grad.copy_(v)  # type: ignore[union-attr]
        graph.replay()
        torch.cuda.synchronize()
        norm = math.sqrt(sum(exact(v, 2.0) for v in values))
        assert report.total_norm.item() == pytest.approx(norm, rel=1e-6)
        assert report.clipped.item() == (norm > 1)
        for p, v in zip(parameters, values, strict=True):
            if norm > 1:
                torch.testing.assert_close(p.grad, v / norm, rtol=1e-5, atol=0)
            else:
                assert torch.equal(p.grad, v)  # type: ignore[arg-type]


# Warm-up runs on one stream, the capture on another, as torch's own guide has it.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream:UserWarning")
def test_a_whole_step_in_a_graph() -> None:
    """Backward allocates the gradients within the graph, at addresses that no step before has seen."""
    model, eager = _model(), _model()
    clipper = distclip.Clipper(model, distclip.GlobalNorm(0.5))
    x = torch.randn(8, 64, device="cuda")

    def backward(model: nn.Module, x: Tensor) -> None:
        model.zero_grad(set_to_none=True)
        model(x).pow(2).sum().backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            backward(model, x)
            clipper.clip()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph, kept = torch.cuda.CUDAGraph(), len(triton._captured)
    with torch.cuda.graph(graph):
        backward(model, x)
        report = clipper.clip()
    assert len(triton._captured) > kept
    _churn()
    for seed in range(3):
        x.copy_(torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        backward(eager, x)
        want = nn.utils.clip_grad_norm_(eager.parameters(), 0.5)
        assert want > 0.5
        assert report.total_norm.item() == pytest.approx(want.item(), rel=1e-5)
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)


def test_a_graph_of_what_has_not_run_before() -> None:
    """Nothing can be compiled or copied then: torch's operators are captured."""
    sizes = [12_347, 5]  # that no other test has
    tensors = randn(sizes, torch.bfloat16)
    c = torch.tensor(0.3, device="cuda")
    stay = [t.clone() for t in tensors]
    foreach.power_sums(stay, 2.0, torch.float32)
    foreach.scale_([t.clone() for t in stay], c)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = kernels.power_sums(tensors, 2.0, torch.float32)
        kernels.scale_(tensors, c)
    graph.replay()
    assert sums.tolist() == close(stay, 2.0)
    for got, before in zip(tensors, stay, strict=True):
        assert torch.equal(got, (before.float() * c).to(torch.bfloat16))


def milliseconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(15):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(2_000_000)  # 1 ms, in which the host gets ahead: only the device is timed
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bandwidth(dtype: torch.dtype, capsys: pytest.CaptureFixture[str]) -> None:
    """GB/s beside a copy on the device (which reads and writes), and torch's operators."""
    tensors = randn([n for n in SIZES for _ in range(4)], dtype)
    total = sum(t.numel() * t.element_size() for t in tensors) / 1e6  # MB, so that MB / ms = GB/s
    flat = torch.empty(int(total * 1e6) // 4, device="cuda")
    other = torch.empty_like(flat)
    one, less = torch.ones((), device="cuda"), torch.full((), 0.999999, device="cuda")
    rates = {"copy": 2 * total / milliseconds(lambda: other.copy_(flat))}
    rates["read (amax)"] = total / milliseconds(lambda: flat.amax())
    for name, module in (("Triton", kernels), ("foreach", foreach)):
        sums = partial(module.power_sums, tensors, 2.0, torch.float32)
        rates[f"{name}: sums"] = total / milliseconds(sums)
        rates[f"{name}: scale"] = 2 * total / milliseconds(partial(module.scale_, tensors, less))
    early = milliseconds(lambda: kernels.scale_(tensors, one))
    with capsys.disabled():
        print(f"\n{len(tensors)} tensors of {dtype}, {total / 1e3:.2f} GB, on {torch.cuda.get_device_name()}")
        for name, rate in rates.items():
            print(f"  {name:16} {rate:8.0f} GB/s")
        print(f"  early-out        {early * 1e3:8.0f} µs")
    assert rates["Triton: sums"] > 0.5 * rates["copy"]
    assert rates["Triton: scale"] > 0.5 * rates["copy"]
    assert early < 0.2 * total / rates["copy"] + 0.1  # milliseconds: far less than a read
