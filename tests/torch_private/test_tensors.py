"""What is read of tensors, autograd, operators and foreach, on the torch that is installed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from distclip.torch_private import autograd, foreach, operators, tensors, writes


def test_storage_of() -> None:
    a, b = torch.zeros(4), torch.zeros(4)
    assert tensors.storage_of(a) == tensors.storage_of(a[1:]) != tensors.storage_of(b)
    with FakeTensorMode():
        c = torch.zeros(4)
        assert tensors.storage_of(c) == tensors.storage_of(c[1:])


def test_overlaps_itself() -> None:
    assert tensors.overlaps_itself(torch.zeros(1).expand(4))
    assert not tensors.overlaps_itself(torch.zeros(4))


def test_sparse_values_and_indices() -> None:
    once, twice = torch.tensor([[0, 2]]), torch.tensor([[1, 1]])
    for indices in (once, twice):  # the second is not coalesced, and stays so
        sparse = torch.sparse_coo_tensor(indices, torch.tensor([3.0, 4.0]), (3,), check_invariants=True)
        assert tensors.sparse_values(sparse).tolist() == [3.0, 4.0]
        assert torch.equal(tensors.sparse_indices(sparse), indices)


def test_version() -> None:
    t = torch.zeros(2)
    before = autograd.version(t)
    t.add_(1)
    assert autograd.version(t) == before + 1
    with torch.inference_mode():
        inference = torch.zeros(2)
    with pytest.raises(RuntimeError):
        autograd.version(inference)


def test_current_graph_task() -> None:
    seen: list[int] = []
    w = torch.ones(2, requires_grad=True)
    w.register_hook(lambda g: seen.append(autograd.current_graph_task()))
    for _ in range(2):
        w.sum().backward()
    assert autograd.current_graph_task() == -1
    assert -1 not in seen
    assert len(set(seen)) == 2


def test_at_the_end_of_backward() -> None:
    order: list[str] = []
    w = torch.ones(2, requires_grad=True)

    def hook(gradient: Tensor) -> None:
        autograd.at_the_end_of_backward(lambda: order.append("end"))
        order.append("hook")

    w.register_hook(hook)
    w.register_post_accumulate_grad_hook(lambda p: order.append("accumulated"))
    w.sum().backward()
    assert order == ["hook", "accumulated", "end"]
    with pytest.raises(RuntimeError):
        autograd.at_the_end_of_backward(lambda: None)


def test_foreach_norm() -> None:
    norms = foreach.foreach_norm([torch.tensor([3.0, 4.0]), torch.tensor([-2.0])], 2.0, dtype=torch.float64)
    assert [n.item() for n in norms] == [5.0, 2.0]
    assert norms[0].dtype == torch.float64
    assert [n.item() for n in foreach.foreach_norm([torch.tensor([3.0, -4.0])], float("inf"))] == [4.0]


def test_foreach_mul_() -> None:
    both = [torch.ones(2), torch.ones(3)]
    foreach.foreach_mul_(both, torch.tensor(3.0))
    foreach.foreach_mul_(both, [torch.tensor(1.0), torch.tensor(2.0)])
    assert [t.tolist() for t in both] == [[3.0] * 2, [6.0] * 3]


def test_foreach_add_() -> None:
    table = torch.zeros(2, dtype=torch.int64)
    foreach.foreach_add_(list(table.unbind()), [2**53 + 1, 7])
    assert table.tolist() == [2**53 + 1, 7]


def test_foreach_copy_() -> None:
    to = [torch.zeros(2), torch.zeros(1)]
    foreach.foreach_copy_(to, [torch.ones(2), torch.full((1,), 2.0)])
    assert [t.tolist() for t in to] == [[1.0, 1.0], [2.0]]


def test_fake_tensor() -> None:
    with FakeTensorMode():
        assert isinstance(torch.zeros(2), operators.FakeTensor)
    assert not isinstance(torch.zeros(2), operators.FakeTensor)


def test_dispatch_mode_schema_of_and_read_to_host() -> None:
    seen: list[Any] = []

    class Mode(operators.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add_(1).sum().item()
    assert operators.READ_TO_HOST in seen
    written = {
        operators.schema_of(f).name
        for f in seen
        if any(a.alias_info is not None and a.alias_info.is_write for a in operators.schema_of(f).arguments)
    }
    assert "aten::add_" in written
    assert "aten::sum" not in written


def test_tree_leaves_and_tree_map() -> None:
    tree = [1, (2, {"a": 3})]
    assert operators.tree_leaves(tree) == [1, 2, 3]
    assert operators.tree_map(lambda n: 2 * n, tree) == [2, (4, {"a": 6})]


def test_writes() -> None:
    """(What it sees of all ways to write: tests/faults/test_30_overlap.py.)"""
    assert writes.AVAILABLE
    t = torch.zeros(4)
    mark = writes.mark(t)
    assert mark is not None
    assert mark.holds
    assert writes.is_marked(t)
    assert writes.address(t[1:]) == writes.address(t) + 4
    assert writes.is_marked(t)
    t.data.add_(1)
    assert not writes.is_marked(t)
    assert writes.address(t) == t.data_ptr()
