from __future__ import annotations

import gc
import sys

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported lives on: no test need look through it (transformers, JAX and others are a million
    objects, a second for each ``gc.collect()``)."""
    gc.collect()
    gc.freeze()


_modules = 0


def pytest_runtest_teardown() -> None:
    """Likewise what a test has imported."""
    global _modules
    if len(sys.modules) > _modules:
        _modules = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    gc.unfreeze()  # else native libraries report at exit what has leaked


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
