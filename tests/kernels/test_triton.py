"""Triton's kernels without a GPU: what they compute (in Triton's interpreter), what they compile to, and when
they are chosen."""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distclip import kernels
from distclip.kernels import foreach, programs
from distclip.kernels import triton as host
from tests.starting import python

ROOT = Path(__file__).parents[2]
CUDA = torch.device("cuda", 0)
TABLES = {"addresses": "*i64", "owners": "*i32", "starts": "*i64", "counts": "*i32"}


def test_in_the_interpreter() -> None:
    """Of its own process: TRITON_INTERPRET has to be set before Triton is imported."""
    command = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/triton_interpreted.py")
    done = python(*command, TRITON_INTERPRET="1", PYTEST_ADDOPTS="")
    assert re.search(r"^\d\d+ passed in ", done.stdout, re.MULTILINE), done.stdout


def ptx(
    name: str, dtype: torch.dtype, capability: int, signature: dict[str, str], **constants: object
) -> str:
    """What a program compiles to, with everything that is passed by pointer aligned."""
    _needs_triton_3_3()
    constants = {**constants, "DTYPE": programs.DTYPES[dtype], "BLOCK": host._BLOCK}
    source = ASTSource(
        fn=getattr(programs, name),
        signature={**TABLES, **signature, **dict.fromkeys(constants, "constexpr")},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in range(4)},
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": 4, **host._OPTIONS}
    return str(triton.compile(source, target=target, options=options).asm["ptx"])


def _needs_triton_3_3() -> None:
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3):
        pytest.skip("Triton 3.2, of torch 2.6, is told of constants in another way")


def accesses(code: str, kind: str) -> Counter[int]:
    """Bytes of an access to global memory -> how many there are."""
    found = re.findall(kind + r"\.global(?:\.L\w+::\w+)*(?:\.v(\d))?\.b(\d+)", code)
    return Counter(int(vector or 1) * int(bits) // 8 for vector, bits in found)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_wide_loads_only_where_addresses_are_aligned(dtype: torch.dtype, capability: int) -> None:
    """One of 16 bytes where they are, and none that is wider than an element in the branch where not."""
    code = ptx("sum_chunks", dtype, capability, {"out": "*fp64"}, P=2.0, REPEAT=host._REPEAT)
    loads = accesses(code, "ld")
    per_thread = host._BLOCK // 128
    assert loads[16] == host._REPEAT * per_thread * dtype.itemsize // 16
    elements = loads[dtype.itemsize] - (2 if dtype.itemsize == 4 else 0)  # count and owner are 4 bytes
    # The branch that is not aligned, the end, and what float32 does not hold, once more.
    assert elements == (host._REPEAT + 2) * per_thread
    assert set(loads) == {16, 8, 4, dtype.itemsize}
    assert "ld.local" not in code


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", programs.DTYPES, ids=str)
@pytest.mark.parametrize("each", [False, True])
def test_the_scaling_is_float32_and_rounds_to_nearest(
    dtype: torch.dtype, capability: int, each: bool
) -> None:
    signature = {"num_chunks": "i32", "coefficients": "*fp64"}
    code = ptx("scale_chunks", dtype, capability, signature, EACH=each)
    per_thread = host._BLOCK // 128
    stores = accesses(code, "st")
    assert stores == {16: per_thread * dtype.itemsize // 16, dtype.itemsize: 2 * per_thread}
    multiplied = Counter(re.findall(r"\bmul\.\S*f\d+\S*", code))
    assert set(multiplied) == {"mul.f32", "mul.f64"}  # and no .ftz
    assert multiplied["mul.f64"] < per_thread, "the coefficients, not the elements"
    downwards = re.findall(r"cvt\.(\w+)\.b?f16(?:x2)?\.f32", code)
    assert set(downwards) == (set() if dtype == torch.float32 else {"rn"})


def test_powers_compile() -> None:
    for p in (0.0, 0.5, 1.0, 3.0):
        code = ptx("sum_chunks", torch.bfloat16, 90, {"out": "*fp64"}, P=p, REPEAT=host._REPEAT)
        assert bool(re.search(r"sqrt\.\w+", code)) == (p == 0.5)
    for p in (0.0, 2.0):
        constants = {"P": p, "BLOCK": 2048}
        signature = {
            "chunks": "*fp64",
            "bounds": "*i32",
            "out": "*fp64",
            **dict.fromkeys(constants, "constexpr"),
        }
        _needs_triton_3_3()
        source = ASTSource(fn=programs.sum_tensors, signature=signature, constexprs=constants)
        options = {"num_warps": 8, **host._OPTIONS}
        code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        assert ("add.f64" in code) == (p == 2), "bits are compared, not added"


def test_not_imported_without_a_gpu() -> None:
    code = (
        "import sys, torch, distclip; w = torch.nn.Parameter(torch.ones(3)); w.grad = torch.ones(3)\n"
        "distclip.Clipper([w], distclip.GlobalNorm(0.1)).clip()\n"
        "assert 'distclip.kernels.foreach' in sys.modules\n"
        "assert 'distclip.kernels.triton' not in sys.modules"
    )
    python("-c", code)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "works_on", lambda device: True)
    assert kernels._runs_in_triton(CUDA)
    monkeypatch.setenv("DISTCLIP_TRITON", "0")
    assert not kernels._runs_in_triton(CUDA)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "works_on", lambda device: True)
    for name in ("triton", "programs"):
        monkeypatch.delattr(kernels, name)
        monkeypatch.delitem(sys.modules, f"distclip.kernels.{name}")
    monkeypatch.setitem(sys.modules, "triton", None)  # makes the import fail
    assert not kernels._runs_in_triton(CUDA)


def test_where_the_kernels_do_not_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not a CUDA device, so nothing can be launched there: one message, and foreach."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.full(size, 1.0))
    with caplog.at_level(logging.WARNING, "distclip"):
        assert not kernels._runs_in_triton(CUDA)
    assert len(caplog.records) == 1
    assert "DISTCLIP_TRITON=0" in caplog.text
    caplog.clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not host.works_on(CUDA)
    assert not caplog.records


def test_the_cpu_and_what_is_compiled_go_to_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device = CUDA

    monkeypatch.setitem(kernels._in_triton, CUDA, True)
    assert kernels.goes_to_triton(OnCuda())  # type: ignore[arg-type]
    assert not kernels.goes_to_triton(torch.ones(1))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not kernels.goes_to_triton(OnCuda())  # type: ignore[arg-type]


def test_the_choice_is_made_once_and_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called: Counter[str] = Counter()
    for module in (foreach, host):
        for name in ("power_sums", "scale_", "scale_each_"):
            key = f"{module.__name__.rsplit('.', 1)[1]}.{name}"
            monkeypatch.setattr(module, name, lambda *a, key=key: called.update([key]))
    g, c = [torch.ones(3)], torch.ones(())
    for in_triton in (False, True):
        monkeypatch.setattr(kernels, "goes_to_triton", lambda tensor, chosen=in_triton: chosen)
        kernels.power_sums(g, 2, torch.float32)
        kernels.scale_(g, c)
        kernels.scale_each_(g, c.view(1))
    names = ("power_sums", "scale_", "scale_each_")
    assert called == {f"{module}.{name}": 1 for module in ("foreach", "triton") for name in names}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_foreach_on_cuda_rounds_once(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does there, done here; tests/gpu/test_triton.py sees that it does."""
    monkeypatch.setattr(foreach, "_narrow_on_cuda", lambda tensor: True)
    called: Counter[str] = Counter()
    monkeypatch.setattr(foreach, "foreach_mul_", lambda *a: called.update(["foreach"]))
    tensors = [torch.randn(shape).to(dtype) for shape in ((1000,), (), (3, 4))]
    c = torch.tensor(0.34567)
    once = [(t.float() * c).to(dtype) for t in tensors]
    foreach.scale_(tensors, c)
    assert all(torch.equal(a, b) for a, b in zip(tensors, once, strict=True))
    want = [(t.float() * c.square()).to(dtype) for t in tensors]
    foreach.scale_each_(tensors, c.square().expand(3))
    assert all(torch.equal(a, b) for a, b in zip(tensors, want, strict=True))
    assert not called
