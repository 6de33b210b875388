from __future__ import annotations

import gc
import sys
from collections.abc import Generator

import pytest
import torch

from tests.starting import TORCH


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is imported lives on: no test need look through it (transformers, JAX and others are a million
    objects, a second for each ``gc.collect()``)."""
    gc.collect()
    gc.freeze()


_CANNOT = {
    (2, 6): {"'Stream' object has no attribute 'record_event'": "FSDP2 of torch 2.6 does not run on a CPU"},
    (2, 8): {"assert self.mask_buffer.data is not None": "torch 2.8 loses the mask of a sharded embedding"},
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """What torch cannot do is no fault of distclip's, and says so in the row of that torch."""
    try:
        yield
    except Exception as error:
        for sign, reason in _CANNOT.get(TORCH, {}).items():
            if sign in str(error):
                pytest.skip(reason)
        raise


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
