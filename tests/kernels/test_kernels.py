"""The kernels against float64, and their rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from distclip import kernels

NORM_TYPES = (0.5, 1.0, 2.0, 3.0, math.inf)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


def exact(tensor: Tensor, p: float) -> float:
    """``Σ|g|^p``, or ``max|g|``, from the definition in float64."""
    magnitude = tensor.to(torch.complex128 if tensor.is_complex() else torch.float64).abs()
    return (magnitude.max() if math.isinf(p) else magnitude.pow(p).sum()).item()


def measured(tensors: list[Tensor], p: float, accumulate: torch.dtype = torch.float32) -> list[float]:
    sums = kernels.power_sums(tensors, p, accumulate)
    assert sums.dtype == torch.float64
    return sums.tolist()


def close(tensors: list[Tensor], p: float) -> object:
    """Law 1's 1e-6 for the norm, which is p times that for the sum."""
    return pytest.approx([exact(t, p) for t in tensors], rel=1e-6 * (1 if math.isinf(p) else p))


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_power_sums_equal_float64(p: float, dtype: torch.dtype) -> None:
    tensors = [torch.randn(n, dtype=dtype) for n in (1, 7, 60_000, 1 << 16, (1 << 16) + 1, 200_005)]
    assert measured(tensors, p) == close(tensors, p)


@pytest.mark.parametrize("shape", [(), (5,), (16, 32), (48, 48), (1, 1009), (250, 260)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_of_one_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Each by itself, in whatever order they come among others, and however it lies."""
    others = [torch.randn(n, dtype=dtype) for n in (1, 1009, 70_008)]
    others[2] = others[2][5:]  # 70,003 is a prime number
    large = torch.randn(4, *shape, dtype=dtype)
    alike = [(i + 1) * torch.randn(shape, dtype=dtype) for i in range(40)]
    columns = torch.randn(*shape, 3, dtype=dtype)
    tensors = [*alike[:3], others[0], *large, *alike[3:20], others[1], columns[..., 1], *alike[20:]]
    tensors.append(others[2])
    assert measured(tensors, 2) == close(tensors, 2)
    assert measured(tensors[::-1], 2) == measured(tensors, 2)[::-1]  # bit for bit


@pytest.mark.parametrize("p", NORM_TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_power_sums_of_five_million(p: float, dtype: torch.dtype) -> None:
    tensors = [torch.rand(5, dtype=dtype), torch.rand(5_000_000, dtype=dtype)]
    assert measured(tensors, p) == close(tensors, p)


@pytest.mark.parametrize("value", [0.1, 0.113, 1 / 3, 1.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_equal_elements(value: float, dtype: torch.dtype) -> None:
    """``p.sum().backward()``: every addition to a float32 sum then rounds to the same side."""
    whole = torch.full((2, 1_000_000), value, dtype=dtype)
    tensors = [whole[0, :n] for n in (100, 2_000, 60_000, 1_000_000)]
    tensors += [whole.t()[:n, 0] for n in (2_000,)] + [
        torch.stack([whole[0]] * 2, 1)[:n, 0] for n in (2_000, 60_000)
    ]
    for p in NORM_TYPES:
        assert measured(tensors, p) == close(tensors, p)


def test_where_torch_loses_digits() -> None:
    """torch adds 20 M float32 squares into a few float32 lanes: 0.07 % off."""
    g = torch.rand(20_000_000)
    want = exact(g, 2)
    assert torch.linalg.vector_norm(g).item() ** 2 != pytest.approx(want, rel=1e-3)
    assert measured([g], 2) == close([g], 2)


def _transposed(base: Tensor) -> Tensor:
    return base.view(512, -1).t()


def _strided(base: Tensor) -> Tensor:
    return base[::2]


def _channels_last(base: Tensor) -> Tensor:
    return base.view(16, 32, -1, 8).permute(0, 3, 1, 2)


def _sliced(base: Tensor) -> Tensor:
    return base.view(512, -1)[:, 3:300]


@pytest.mark.parametrize("view", [_transposed, _strided, _channels_last, _sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_any_strides(view: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """All elements of the view and none beside it, read and written."""
    base = torch.randn(1 << 18, dtype=dtype)
    tensor = view(base)
    whole = tensor.contiguous().clone()
    for p in NORM_TYPES:
        assert measured([tensor], p) == close([whole], p)
    before = base.clone()
    kernels.scale_([tensor], torch.tensor(0.25))
    assert torch.equal(tensor, whole * 0.25)  # a power of two: exact in every dtype
    tensor.copy_(whole)
    assert torch.equal(base, before)


def test_accumulate_float64() -> None:
    """Squares beyond float32's largest and smallest number."""
    tensors = [torch.full((10,), 1e20), torch.full((10,), 1e-30)]
    assert measured(tensors, 2, torch.float64) == pytest.approx([1e41, 1e-59], rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_power_sums_of_non_finite(bad: float) -> None:
    tensors = [torch.tensor([1.0, bad]), torch.tensor([3.0, 4.0])]
    for p in NORM_TYPES:
        first, second = measured(tensors, p)
        assert not math.isfinite(first)
        assert math.isfinite(second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scale_rounds_once(dtype: torch.dtype) -> None:
    """The coefficient stays float32: rounding it first would change every second element."""
    g, c = torch.randn(1000).to(dtype), torch.tensor(0.34567)
    want = (g.float() * c).to(dtype)
    assert not torch.equal(want, g * c.to(dtype))
    one, each = g.clone(), [g.clone(), g.clone()]
    kernels.scale_([one], c)
    kernels.scale_each_(each, torch.stack([c, torch.tensor(1.0)]))
    assert torch.equal(one, want)
    assert torch.equal(each[0], want)
    assert torch.equal(each[1], g)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp(dtype: torch.dtype) -> None:
    """To the bound, with the direction of complex elements kept; what is inside stays bit for bit."""
    g = 2 * torch.randn(1000, dtype=dtype)
    got = g.clone()
    kernels.clamp_([got], torch.tensor(0.5))
    inside = g.abs() <= 0.5
    assert 0 < inside.sum() < 1000
    assert torch.equal(got[inside], g[inside])
    torch.testing.assert_close(got[~inside], (0.5 * g / g.abs())[~inside], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clamp_keeps_nan_and_bounds_infinity(dtype: torch.dtype) -> None:
    g = torch.tensor([math.nan, math.inf, -math.inf, 0.0]).to(dtype)
    kernels.clamp_([g], torch.tensor(0.5))
    assert g[0].isnan()
    assert g[3] == 0
    if dtype.is_complex:  # whose infinities have no direction
        assert g[1:3].isnan().all()
    else:
        assert g[1:3].tolist() == [0.5, -0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fill_where(dtype: torch.dtype) -> None:
    g = torch.tensor([math.nan, math.inf, 3.0]).to(dtype)
    kept = g.clone()
    kernels.fill_where_([kept], 0.0, torch.tensor(False))
    assert torch.equal(kept.nan_to_num(7.0), g.nan_to_num(7.0))
    kernels.fill_where_([g], 0.0, torch.tensor(True))
    assert not g.any()


def test_two_threads_do_not_share_memory() -> None:
    """Rows are measured into memory that is kept from call to call."""
    tensors = [[torch.full((1 << 20,), float(i))] for i in range(1, 5)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for given, found in zip(tensors, pool.map(lambda t: measured(t, 2), tensors), strict=True):
                assert found == close(given, 2)


def test_what_is_not_kept_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(n) for n in (100, 5_000, 70_001)]
    kept = measured(tensors, 2)
    monkeypatch.setattr("distclip.kernels.foreach._KEPT", 1000)
    kernels.foreach._rows_of.cache_clear()
    assert measured(tensors, 2) == kept
    assert kernels.foreach._rows_of.cache_info().currsize == 0
