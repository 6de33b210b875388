"""Triton's kernels on the CPU, in Triton's interpreter. Run by test_triton.py with TRITON_INTERPRET=1, which
has to be set before Triton is imported."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor, nn
from triton.runtime import interpreter

import distclip
from distclip import kernels
from distclip.kernels import foreach, programs
from distclip.kernels import triton as host

# NumPy, which computes here, warns of what is meant to happen.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROGRAMS = ("sum_chunks", "sum_tensors", "scale_chunks")
CHUNK = host._SMALLEST
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the interpreter is not what a device is."""
    cast, patch = interpreter.InterpreterBuilder.cast_impl, interpreter._patch_lang_tensor

    def as_torch(self: Any, src: Any, dst_type: Any) -> Any:
        # It cuts bfloat16 off, and loses the smallest. The compiled code rounds, see test_triton.py.
        if "bf16" not in (str(src.dtype.scalar), str(dst_type.scalar)):
            return cast(self, src, dst_type)
        data = torch.from_numpy(src.data.copy())
        if src.dtype.scalar == tl.bfloat16:
            return interpreter.TensorHandle(data.view(torch.bfloat16).float().numpy(), dst_type.scalar)
        rounded = data.to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy(), dst_type.scalar)

    def loops(tensor: Any, *scope: Any) -> None:
        # Triton 3.6 cannot count to a tensor with NumPy 2.4.
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", as_torch)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", loops)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    host._layouts.clear()
    host._captured.clear()
    yield
    host._layouts.clear()
    host._captured.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each program has been launched."""
    counter: Counter[str] = Counter()

    class Counted:
        def __init__(self, name: str) -> None:
            self.name, self.program = name, getattr(programs, name)

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            counter[self.name] += 1
            return self.program[grid]

    for name in PROGRAMS:
        monkeypatch.setattr(programs, name, Counted(name))
    return counter


@pytest.fixture
def traffic(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many elements the programs have read and written."""
    counter: Counter[str] = Counter()
    for name, mask in (("load", 1), ("store", 2)):
        original = getattr(interpreter.InterpreterBuilder, f"create_masked_{name}")

        def counted(
            self: Any, *args: Any, original: Any = original, name: str = name, mask: int = mask, **kwargs: Any
        ) -> Any:
            counter[name] += int(args[mask].data.sum())
            return original(self, *args, **kwargs)

        monkeypatch.setattr(interpreter.InterpreterBuilder, f"create_masked_{name}", counted)
    return counter


def exact(tensor: Tensor, p: float) -> float:
    magnitude = tensor.double().abs()
    if not magnitude.numel():
        return 0.0
    return (magnitude.max() if math.isinf(p) else magnitude.pow(p).sum()).item()


def measured(tensors: list[Tensor], p: float) -> list[float]:
    sums = host.power_sums(tensors, p, torch.float32)
    assert sums.dtype == torch.float64
    return sums.tolist()


def close(tensors: list[Tensor], p: float) -> object:
    """Law 1's 1e-6 for the norm, which is p times that for the sum."""
    return pytest.approx([exact(t, p) for t in tensors], rel=1e-6 * (1 if math.isinf(p) else p))


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


@pytest.mark.parametrize("p", host.POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_equal_float64(p: float, dtype: torch.dtype, launches: Counter[str]) -> None:
    sizes = (1, 7, 1024, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 2047, 20_005)
    tensors = [torch.randn(n).to(dtype) for n in sizes]
    sums = measured(tensors, p)
    assert sums == close(tensors, p)
    assert launches == {"sum_chunks": 1, "sum_tensors": 1}
    if math.isinf(p):
        assert sums == [exact(t, p) for t in tensors]  # nothing is rounded


@pytest.mark.parametrize("p", [2.0, math.inf])
def test_many_chunks_of_one_tensor(p: float) -> None:
    tensors = [torch.randn(130 * CHUNK + 5), torch.randn(3)]
    assert measured(tensors, p) == close(tensors, p)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
def test_more_chunks_than_are_joined_at_once(bad: float) -> None:
    chunks = torch.rand(700, dtype=torch.float64)
    chunks[650] = bad
    bounds, block = [0, 300, 300, 301, 700], 128
    parts = [chunks[a:b] for a, b in pairwise(bounds)]
    out = torch.full((4,), -1.0, dtype=torch.float64)
    programs.sum_tensors[(4,)](chunks, torch.tensor(bounds, dtype=torch.int32), out, P=2.0, BLOCK=block)
    assert out.tolist() == pytest.approx([part.sum().item() for part in parts], nan_ok=True)
    programs.sum_tensors[(4,)](chunks, torch.tensor(bounds, dtype=torch.int32), out, P=0.0, BLOCK=block)
    want = [part.max().item() if len(part) else 0.0 for part in parts]
    assert out.tolist() == pytest.approx(want, rel=0, abs=0, nan_ok=True)


@pytest.mark.parametrize("value", [0.1, 0.113, 1 / 3, 1.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_elements(value: float, dtype: torch.dtype) -> None:
    """``p.sum().backward()``: every addition then rounds to the same side."""
    whole = torch.full((20_000,), value, dtype=dtype)
    tensors = [whole[:n] for n in (100, 2_000, CHUNK, 20_000)]
    for p in host.POWERS:
        assert measured(tensors, p) == close(tensors, p)


def test_equal_elements_of_a_long_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as chunks can get: 256 additions in every lane."""
    monkeypatch.setattr(host, "_SMALLEST", host._LARGEST)
    g = torch.full((host._LARGEST,), 0.113)
    for p in (1.0, 2.0):
        assert measured([g], p) == pytest.approx([exact(g, p)], rel=2e-7)


@pytest.mark.parametrize("p", host.POWERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment(p: float, dtype: torch.dtype) -> None:
    """Element-aligned views: the same bits as of aligned copies, and nothing beside the view is read."""
    base = torch.full((3 * CHUNK + 64,), math.nan).to(dtype)
    views = [base[1 : CHUNK + 8], base[CHUNK + 9 : 3 * CHUNK + 10]]
    copies = []
    for view in views:
        view.copy_(torch.randn(view.shape))
        copies.append(view.clone())
    assert [c.data_ptr() % 16 for c in copies] == [0, 0]
    assert any(v.data_ptr() % 16 for v in views)
    assert measured(views, p) == measured(copies, p) == close(copies, p)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite(bad: float, dtype: torch.dtype) -> None:
    positions = (0, CHUNK - 1, CHUNK, CHUNK + 1030, CHUNK + 1035)
    tensors = [torch.randn(CHUNK + 1036).to(dtype) for _ in positions]
    for tensor, position in zip(tensors, positions, strict=True):
        tensor[position] = bad
    tensors.append(torch.tensor([3.0, 4.0], dtype=dtype))
    for p in host.POWERS:
        *sums, finite = measured(tensors, p)
        assert [math.isnan(s) if math.isnan(bad) else s == math.inf for s in sums] == [True] * 5, p
        assert finite == pytest.approx(exact(tensors[-1], p), rel=1e-6)


def test_range() -> None:
    """Squares beyond float16; cubes beyond float32, in both directions; the smallest numbers there are."""
    half = [torch.full((500,), 300.0, dtype=torch.float16)]
    assert measured(half, 2) == close(half, 2)
    for value in (1e20, 1e-20):
        wide = [torch.full((500,), value)]
        assert measured(wide, 3) == close(wide, 3)
    tiny = [torch.full((500,), 1e-42)]
    for p in (1.0, math.inf):
        assert measured(tiny, p) == close(tiny, p)


def test_empty_tensors(launches: Counter[str]) -> None:
    tensors = [torch.zeros(0), torch.randn(2 * CHUNK), torch.zeros(0), torch.randn(3), torch.zeros(0)]
    for p in host.POWERS:
        assert measured(tensors, p) == close(tensors, p)
    before = tensors[3].clone()
    host.scale_(tensors, torch.tensor(2.0))
    host.scale_each_(tensors, torch.tensor([9.0, 9.0, 9.0, 2.0, 9.0]))
    assert torch.equal(tensors[3], before * 4)
    small = [torch.zeros(0), torch.full((2,), 3.0)]
    assert measured(small, 2) == [0.0, 18.0]
    launches.clear()
    assert measured([torch.zeros(0)] * 2, 2) == [0.0, 0.0]
    host.scale_([torch.zeros(0)], torch.tensor(2.0))
    assert launches["sum_chunks"] == launches["scale_chunks"] == 0


def test_the_same_bits_every_time() -> None:
    tensors = [torch.randn(n) for n in (CHUNK * 3 + 5, 77)]
    for p in host.POWERS:
        assert measured(tensors, p) == measured(tensors, p) == measured([t.clone() for t in tensors], p)


def test_offsets_beyond_32_bits() -> None:
    """A chunk that starts 6 GB into its tensor (whose address is moved back by as much)."""
    g = torch.randn(CHUNK)
    far = 6 << 30
    layout = host._Layout.of([CHUNK], 4, CPU)
    out = torch.zeros(1, dtype=torch.float64)
    table, start = torch.tensor([g.data_ptr() - far]), torch.tensor([far])
    programs.sum_chunks[(1,)](
        table, layout.owners, start, layout.counts, out,
        P=2.0, DTYPE=programs.DTYPES[g.dtype], BLOCK=host._BLOCK, REPEAT=host._REPEAT,
    )  # fmt: skip
    assert out.tolist() == close([g], 2)


@pytest.mark.parametrize("sizes", [[1], [0, 5, 0], [3_000_000, 1, 4096, 4097], [7, 3 << 31], [2] * 3000])
def test_chunks_cover_every_element_once(sizes: list[int]) -> None:
    itemsize = 2
    layout = host._Layout.of(sizes, itemsize, CPU)
    owners, starts, counts = (t.tolist() for t in layout.chunks)
    ends = [0] * len(sizes)
    for owner, start, count in zip(owners, starts, counts, strict=True):
        assert start == ends[owner] * itemsize  # one after the other
        assert start % 16 == 0
        assert 0 < count <= host._LARGEST
        ends[owner] += count
    assert ends == sizes
    bounds = layout.bounds.tolist()
    assert [owners[a:b] for a, b in pairwise(bounds)] == [
        [i] * (bounds[i + 1] - bounds[i]) for i in range(len(sizes))
    ]
    assert layout.most == max(b - a for a, b in pairwise(bounds))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("coefficient", [0.34567, 1e-5, 0.0, 3.0, math.inf, math.nan])
def test_scale_is_foreach_bit_for_bit(dtype: torch.dtype, coefficient: float) -> None:
    special = [math.nan, math.inf, -math.inf, -0.0, 0.0, 65504.0, 1e-40, 6e-8, 1e-5]
    tensors = [torch.randn(n).to(dtype) for n in (1, 1024, CHUNK, CHUNK + 1, 2 * CHUNK + 1500)]
    tensors += [torch.randn(CHUNK + 40).to(dtype)[3:], torch.tensor(special).to(dtype)]
    want = [t.clone() for t in tensors]
    c = torch.tensor(coefficient)
    host.scale_(tensors, c)
    foreach.scale_(want, c)
    for got, wanted in zip(tensors, want, strict=True):
        assert torch.equal(got.isnan(), wanted.isnan())
        assert torch.equal(bits(got)[~got.isnan()], bits(wanted)[~got.isnan()])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale_each_is_foreach_bit_for_bit(dtype: torch.dtype, launches: Counter[str]) -> None:
    tensors = [torch.randn(n).to(dtype) for n in (5, CHUNK + 1, 2 * CHUNK, 1)]
    want = [t.clone() for t in tensors]
    coefficients = torch.tensor([[0.3, 1.0], [1.0, 1.0], [0.77, 0.0], [2.5, 7.0]])[:, 0]  # with gaps
    host.scale_each_(tensors, coefficients)
    foreach.scale_each_(want, coefficients)
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))
    assert launches == {"scale_chunks": 1}


def test_more_chunks_than_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_PROGRAMS", 2)
    tensors = [torch.randn(n) for n in (3 * CHUNK + 1, 10, CHUNK)]
    want = [t * 0.3 * 0.7 for t in tensors]
    host.scale_(tensors, torch.tensor(0.3))
    host.scale_each_(tensors, torch.full((3,), 0.7))
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_coefficient_of_one_touches_nothing(dtype: torch.dtype, traffic: Counter[str]) -> None:
    """Not even a signalling NaN, which a multiplication by 1 would change."""
    signalling = {torch.float32: 0x7F800001, torch.bfloat16: 0x7F81, torch.float16: 0x7C01}[dtype]
    g = torch.randn(3 * CHUNK + 5).to(dtype)
    bits(g)[5] = signalling
    g[6] = -0.0
    before = bits(g).clone()
    host.scale_([g], torch.tensor(1.0))
    assert torch.equal(bits(g), before)
    assert traffic == {"load": 4}  # of the coefficient, once by each program
    host.scale_([g], torch.tensor(0.999))
    assert traffic["store"] == g.numel()
    assert not torch.equal(bits(g), before)


def test_only_gradients_with_another_coefficient_are_touched(traffic: Counter[str]) -> None:
    tensors = [torch.randn(n) for n in (CHUNK + 3, 50, CHUNK)]
    before = [bits(t).clone() for t in tensors]
    host.scale_each_(tensors, torch.tensor([1.0, 0.5, 1.0]))
    assert [torch.equal(bits(t), b) for t, b in zip(tensors, before, strict=True)] == [True, False, True]
    assert traffic["store"] == 50


def test_one_launch_for_all(launches: Counter[str]) -> None:
    tensors = [torch.randn(n) for n in range(1, 60)]
    assert measured(tensors, 2) == close(tensors, 2)
    assert launches == {"sum_chunks": 1}  # one chunk each: nothing to join
    host.scale_(tensors, torch.tensor(0.5))
    assert launches == {"sum_chunks": 1, "scale_chunks": 1}


def test_tables_are_made_once_and_again_when_buffers_move(monkeypatch: pytest.MonkeyPatch) -> None:
    made: Counter[str] = Counter()
    layout_of, tensor = host._Layout.of, torch.tensor
    monkeypatch.setattr(host._Layout, "of", lambda *a: (made.update(["chunks"]), layout_of(*a))[1])
    tensors = [torch.randn(n) for n in (50, CHUNK + 1)]
    moved = [t.clone() * 2 for t in tensors]

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        made.update(["addresses"] if "pin_memory" in kwargs else [])
        return tensor(*args, **kwargs)

    monkeypatch.setattr(torch, "tensor", counted)
    for _ in range(3):
        assert measured(tensors, 2) == close(tensors, 2)
        host.scale_(tensors, torch.full((), 0.5))
    assert made == {"chunks": 1, "addresses": 1}
    assert measured(moved, 2) == close(moved, 2)
    assert made == {"chunks": 1, "addresses": 2}
    assert measured(tensors, 2) == close(tensors, 2)  # two buffers, turn and turn about
    assert measured(moved, 2) == close(moved, 2)
    assert made == {"chunks": 1, "addresses": 2}
    assert measured([*moved, tensors[0]], 2) == close([*moved, tensors[0]], 2)  # another number of gradients
    assert measured([t.half() for t in moved], 2) == close([t.half() for t in moved], 2)  # another dtype
    assert made == {"chunks": 3, "addresses": 4}


def test_each_stream_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP's hooks run on a stream of a pool, the next one each time: when one comes back, nothing is made."""
    tensors = [torch.randn(n) for n in (50, CHUNK + 1)]
    for turn in range(2):
        for stream in (3, 5):
            monkeypatch.setattr(host, "_stream", lambda device, stream=stream: stream)
            assert measured(tensors, 2) == close(tensors, 2)
        if turn == 0:
            first = dict(host._layouts)
    assert sorted(stream for _, stream in first) == [3, 5]
    assert host._layouts == first
    monkeypatch.setattr(host, "_capturing", lambda device: True)
    assert host._find(tensors, ("power_sums", 2)) is not None


def test_tables_in_use_are_never_overwritten() -> None:
    tensors = [torch.randn(8) for _ in range(4)]
    tables = []
    for i in range(3):
        host.power_sums([t[i:] for t in tensors], 2, torch.float32)
        tables += [t for layout in host._layouts.values() for t in layout.tables.values()]
    for layout in host._layouts.values():
        for addresses, table in layout.tables.items():
            assert table.tolist() == list(addresses)
    assert len({t.data_ptr() for t in tables}) == 3


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_KEPT", 3 * 1025)
    for n in range(1, 8):
        assert measured([torch.ones(n)], 2) == [n]
        assert len(host._layouts) <= 3
    base = torch.ones(3000)
    for i in range(10):
        found = host._find([base[i + j : i + j + 1] for j in range(600)], ("power_sums", 2))
        assert found is not None
    (layout,) = (v for k, v in host._layouts.items() if len(k[0][2]) == 600)
    assert len(layout.tables) == 2


def test_under_capture(monkeypatch: pytest.MonkeyPatch, launches: Counter[str]) -> None:
    """Only what has run before, with addresses that stay; the rest is left to foreach."""
    tensors = [torch.randn(n) for n in (50, CHUNK + 1)]
    moved = [t.clone() for t in tensors]
    with monkeypatch.context() as capture:
        capture.setattr(host, "_capturing", lambda device: True)
        assert measured(tensors, 2) == close(tensors, 2)
        assert not launches
        assert not host._layouts
    host.power_sums(tensors, 2, torch.float32)
    (layout,) = host._layouts.values()
    with monkeypatch.context() as capture:
        capture.setattr(host, "_capturing", lambda device: True)
        launches.clear()
        assert measured(tensors, 2) == close(tensors, 2)
        assert launches == {"sum_chunks": 1, "sum_tensors": 1}
        ((kept_layout, kept),) = host._captured.values()
        assert kept_layout is layout
        assert kept is layout.tables[tuple(t.data_ptr() for t in tensors)]
        assert measured(moved, 2) == close(moved, 2)  # written by kernels
        assert launches == {"sum_chunks": 2, "sum_tensors": 2}
        assert len(layout.tables) == 1
        assert [t.tolist() for _, t in host._captured.values()][1] == [t.data_ptr() for t in moved]
        launches.clear()
        host.power_sums(tensors, 1, torch.float32)  # neither has run before
        host.scale_(tensors, torch.tensor(0.5))
        assert not launches
    assert torch.equal(tensors[1], moved[1] * 0.5)


def _complex(t: Tensor) -> Tensor:
    return torch.complex(t, t)


@pytest.mark.parametrize(
    "change",
    [Tensor.double, _complex, lambda t: t[::2], lambda t: t.view(100, -1)[:, 1:]],
    ids=["float64", "complex64", "strided", "sliced"],
)
def test_left_to_foreach(change: Callable[[Tensor], Tensor], launches: Counter[str]) -> None:
    tensors = [change(torch.randn(5000)), change(torch.randn(200))]
    for p in host.POWERS:
        assert torch.equal(
            host.power_sums(tensors, p, torch.float32), foreach.power_sums(tensors, p, torch.float32)
        )
    want = [t.clone() for t in tensors]
    host.scale_(tensors, torch.tensor(0.3))
    foreach.scale_(want, torch.tensor(0.3))
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))
    assert not launches


def test_other_powers_and_sums_in_float64_are_left_to_foreach(launches: Counter[str]) -> None:
    tensors = [torch.full((10,), 1e20)]
    assert host.power_sums(tensors, 2, torch.float64).tolist() == pytest.approx([1e41])
    assert host.power_sums(tensors, 1.5, torch.float32).tolist() == pytest.approx([1e31])
    assert not launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [1.0, 2.0])
def test_what_float32_does_not_hold_is_summed_in_float64(p: float, dtype: torch.dtype) -> None:
    """Four absolute values added in float32, squares of 1e19 and of 1e-23: only these chunks again."""
    large, small = (6e4, 6e-8) if dtype == torch.float16 else (1e38, 1e-30)
    tensors = [torch.full((3 * CHUNK + 5,), x).to(dtype) for x in (large, small, 0.0, 1.0)]
    tensors[3][CHUNK] = large
    assert measured(tensors, p) == close(tensors, p)
    assert measured(tensors, p)[2] == 0


def test_a_coefficient_that_float32_does_not_hold() -> None:
    """1e38 times 1e-42, of which float32 has three digits."""
    tensors = [torch.full((CHUNK + 5,), 1e38)]
    host.scale_(tensors, torch.tensor(1e-42, dtype=torch.float64))
    assert tensors[0].tolist() == pytest.approx([1e-4] * (CHUNK + 5), rel=1e-6)
    host.scale_each_(tensors, torch.tensor([1e-3], dtype=torch.float64))
    assert tensors[0].tolist() == pytest.approx([1e-7] * (CHUNK + 5), rel=1e-6)


@pytest.mark.parametrize(
    "view", [lambda t: t.view(64, -1).t(), lambda t: t.view(4, 8, -1, 4).permute(0, 3, 1, 2)]
)
def test_dense_in_any_order(view: Callable[[Tensor], Tensor], launches: Counter[str]) -> None:
    g = view(torch.randn(1 << 13))
    assert not g.is_contiguous()
    for p in host.POWERS:
        assert measured([g], p) == close([g], p)
    want = g.clone() * 0.3
    host.scale_([g], torch.tensor(0.3))
    assert torch.equal(g, want)
    assert launches["sum_chunks"] == 5
    assert launches["scale_chunks"] == 1


def test_autograd_sees_the_change() -> None:
    """What was saved for a backward pass must not change unnoticed."""
    g = torch.randn(5)
    host.scale_([g], torch.tensor(0.5))
    assert g._version == 1


def test_clip_end_to_end(monkeypatch: pytest.MonkeyPatch, launches: Counter[str]) -> None:
    model = nn.Sequential(nn.Linear(60, 90), nn.Tanh(), nn.Linear(90, 3))
    model(torch.randn(8, 60)).pow(2).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]
    for strategy in (distclip.GlobalNorm(0.1), distclip.PerParameter(0.1)):
        after = []
        for in_triton in (False, True):
            monkeypatch.setattr(kernels, "goes_to_triton", lambda tensor, chosen=in_triton: chosen)
            for p, g in zip(model.parameters(), gradients, strict=True):
                p.grad = g.clone()
            report = distclip.Clipper(model, strategy).clip()
            assert report.clipped
            after.append([p.grad.clone() for p in model.parameters()] + [report.total_norm])  # type: ignore[union-attr]
        for a, b in zip(*after, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        assert launches["sum_chunks"] == launches["scale_chunks"] == 1
        launches.clear()
