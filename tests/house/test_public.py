"""The public surface: changing it is a decision, not an accident."""

from __future__ import annotations

import inspect
from importlib.metadata import version
from importlib.resources import files

import pytest
import torch

import distclip
from tests.starting import python

PUBLIC = {
    "AGC",
    "AdaGC",
    "Chain",
    "Clamp",
    "ClipReport",
    "Clipper",
    "Cosine",
    "Decision",
    "DistclipError",
    "GlobalNorm",
    "History",
    "InBackward",
    "NonFiniteError",
    "Norms",
    "OwnershipError",
    "PerGroup",
    "PerParameter",
    "Percentile",
    "Scale",
    "SettingsError",
    "SPAM",
    "SkipSpikes",
    "Strategy",
    "Then",
    "Value",
    "Warmup",
    "ZClip",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "declare",
    "get_total_norm",
    "hooks",
    "total_grad_norm",
    "unscale_",
}


def test_names() -> None:
    assert set(distclip.__all__) == PUBLIC
    assert list(distclip.__all__) == sorted(distclip.__all__)
    assert all(hasattr(distclip, name) for name in PUBLIC)


def test_documented() -> None:
    assert all(inspect.getdoc(getattr(distclip, name)) for name in PUBLIC - {"Decision"})


@pytest.mark.parametrize("name", ["clip_grad_norm_", "clip_grad_value_"])
def test_drop_in_signature(name: str) -> None:
    """The arguments of torch in torch's order with torch's defaults; all of ours keyword-only."""
    mine, theirs = (inspect.signature(getattr(m, name)).parameters for m in (distclip, torch.nn.utils))
    positional = [(p.name, p.default) for p in mine.values() if p.kind is not p.KEYWORD_ONLY]
    assert positional == [(p.name, p.default) for p in theirs.values()]
    assert all(p.default is not p.empty for p in mine.values() if p.kind is p.KEYWORD_ONLY)


def test_total_grad_norm_signature() -> None:
    """As torch's get_total_norm begins; but it takes parameters, where that takes gradients."""
    mine = inspect.signature(distclip.total_grad_norm).parameters.values()
    positional = [(p.name, p.default) for p in mine if p.kind is not p.KEYWORD_ONLY]
    assert positional == [("parameters", inspect.Parameter.empty), ("norm_type", 2.0)]


def test_clipper_signature() -> None:
    clipper = inspect.signature(distclip.Clipper).parameters.values()
    assert [p.name for p in clipper if p.kind is not p.KEYWORD_ONLY] == ["parameters", "strategy"]


def test_typed() -> None:
    assert (files("distclip") / "py.typed").is_file()


def test_version() -> None:
    assert distclip.__version__.count(".") >= 2
    assert distclip.__version__ == version("distclip")


def test_a_source_tree_that_was_never_installed() -> None:
    """On a machine without an index, PYTHONPATH is enough."""
    code = """
from importlib import metadata
of = metadata.Distribution.from_name.__func__
def none(cls, name):
    if name == "distclip":
        raise metadata.PackageNotFoundError(name)
    return of(cls, name)
metadata.Distribution.from_name = classmethod(none)
import distclip.cli, distclip.monitor.commands
print(distclip.__version__)
"""
    assert python("-c", code).stdout.strip() == distclip.__version__


def test_errors() -> None:
    """The tree in distclip.errors; plain RuntimeErrors too, as torch raises."""
    for error in (distclip.OwnershipError, distclip.SettingsError, distclip.NonFiniteError):
        assert issubclass(error, distclip.DistclipError)
        assert issubclass(error, RuntimeError)
    assert not issubclass(distclip.OwnershipError, distclip.NonFiniteError)
