"""Megatron's own layers, and Megatron's own norm of them, beside distclip's.

megatron-core runs here without a GPU: its layers with ``use_cpu_initialization``, its norm where the
buffers that it asks of CUDA by name are made on the CPU instead (``on_cpu``).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import distclip
from distclip.integrations.megatron import annotate
from tests.harness import on_ranks
from tests.layouts import mesh1


@contextmanager
def megatron(**sizes: int) -> Iterator[Any]:
    """Megatron's parallel state, initialised; gone afterwards, for the other tests of this pool."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # at import, about the CUDA packages that it does without
        from megatron.core import parallel_state, tensor_parallel
        from megatron.core.model_parallel_config import ModelParallelConfig

        parallel_state.initialize_model_parallel(create_gloo_process_groups=False, **sizes)
        config = ModelParallelConfig(
            tensor_model_parallel_size=sizes.get("tensor_model_parallel_size", 1),
            use_cpu_initialization=True,
            gradient_accumulation_fusion=False,
        )
        # Afterwards, since 0.12 wants sequence parallelism with both, which would be another test.
        config.expert_model_parallel_size = sizes.get("expert_model_parallel_size", 1)
        common = {"config": config, "init_method": nn.init.xavier_normal_}
        linear = {**common, "bias": True, "skip_bias_add": False}
        try:
            yield SimpleNamespace(
                state=parallel_state,
                embedding=lambda *shape: tensor_parallel.VocabParallelEmbedding(*shape, **common),
                column=lambda *shape, **kw: tensor_parallel.ColumnParallelLinear(
                    *shape, gather_output=False, **linear, **kw
                ),
                row=lambda *shape, **kw: tensor_parallel.RowParallelLinear(
                    *shape, input_is_parallel=True, **linear, **kw
                ),
            )
        finally:
            parallel_state.destroy_model_parallel()


@contextmanager
def on_cpu() -> Iterator[None]:
    """What Megatron puts on CUDA by name, on the CPU."""

    def wrapped(make: Any) -> Any:
        def elsewhere(*args: Any, **kwargs: Any) -> Tensor:
            return make(*args, **(kwargs | {"device": "cpu"}))

        return elsewhere

    with mock.patch.object(torch, "zeros", wrapped(torch.zeros)):
        tensor = wrapped(torch.tensor)
        with mock.patch.object(torch, "tensor", tensor):
            yield


def megatron_norm(
    parameters: list[nn.Parameter], norm_type: float, group: Any, tp_group: Any = None
) -> float:
    """As a MegatronOptimizer that holds these parameters takes it."""
    from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
    from megatron.core.optimizer.optimizer import MegatronOptimizer

    config = SimpleNamespace(
        use_precision_aware_optimizer=False, use_precision_aware_optimizer_no_fp8_or_ds_fp8=False
    )
    optimizer = SimpleNamespace(get_parameters=lambda: parameters, config=config, tp_group=tp_group)
    kind: Any = MegatronOptimizer  # of 0.12, of 0.16 and of 0.19
    if hasattr(kind, "_filter_grads_for_norm"):
        optimizer._filter_grads_for_norm = partial(kind._filter_grads_for_norm, optimizer)
    read = getattr(kind, "get_main_grads_for_grad_norm", None) or kind.get_grads_for_grad_norm
    gradients = read(optimizer)
    with on_cpu():
        return get_grad_norm_fp32(gradients, norm_type, grad_stats_parallel_group=group)


def agreed(model: Any, expected: dict[float, float], **kwargs: Any) -> float:
    """The 2-norm by distclip, after checking it and others against Megatron's and the gathered gradient."""
    for p, norm in expected.items():
        found = distclip.total_grad_norm(model, p, **kwargs).item()
        assert found == pytest.approx(norm, rel=1e-6), p
    assert distclip.Clipper(model, distclip.GlobalNorm(1.0), **kwargs).verify() == pytest.approx(
        expected[2.0], rel=1e-6
    )
    return expected[2.0]


NORMS = (2.0, 1.0, 3.0)


class Block(nn.Module):
    """Embedding, norm and MLP as a Megatron layer has them."""

    def __init__(self, layers: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = layers.embedding(12, 6)
        self.norm = nn.LayerNorm(6)
        self.up = layers.column(6, 8)
        self.down = layers.row(8, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(self.embedding(tokens)))[0]))[0]


def tokens(seed: int) -> Tensor:
    return torch.randint(0, 12, (5, 2), generator=torch.Generator().manual_seed(seed))


@on_ranks(2)
def test_tensor_parallel_layers(rank: int) -> float:
    with megatron(tensor_model_parallel_size=2) as layers:
        model = Block(layers)
        model(tokens(1)).pow(3).sum().backward()
        with pytest.raises(distclip.OwnershipError):  # nothing is guessed
            distclip.total_grad_norm(model)
        annotate(model)
        group = layers.state.get_model_parallel_group()
        norm = agreed(model, {p: megatron_norm(list(model.parameters()), p, group) for p in NORMS})

        table = distclip.Clipper(model, distclip.GlobalNorm(1.0)).describe()
        whole = {row.name for row in table.rows if "sharded" not in row.placement}
        assert whole == {"norm.weight", "norm.bias", "down.bias"}
    return norm


@on_ranks(4)
def test_tied_embedding_of_a_pipeline(rank: int) -> float:
    with megatron(tensor_model_parallel_size=2, pipeline_model_parallel_size=2) as layers:
        state = layers.state
        first = state.is_pipeline_first_stage()
        model = Block(layers)
        weight = model.embedding.weight
        weight.shared_embedding = True
        if not first:  # as Megatron's setup_embeddings_and_output_layer() marks the copy
            weight.shared = True
        model(tokens(1 if first else 2)).pow(3).sum().backward()
        # As its finalize_model_grads() does.
        dist.all_reduce(weight.grad, group=state.get_embedding_group())

        annotate([model])
        group = state.get_model_parallel_group()
        expected = {p: megatron_norm(list(model.parameters()), p, group) for p in NORMS}
        return agreed(model, expected, stages=state.get_pipeline_model_parallel_group())


class Experts(nn.Module):
    """A dense layer, and the one expert of this rank."""

    def __init__(self, layers: Any, seed: int) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.dense = layers.column(6, 8)
        torch.manual_seed(4 + seed)
        group = layers.state.get_expert_tensor_parallel_group()
        self.up = layers.column(6, 4, is_expert=True, tp_group=group)
        self.down = layers.row(4, 6, is_expert=True, tp_group=group)


@pytest.mark.parametrize("expert_tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("idle", [False, True], ids=["busy", "idle"])
@on_ranks(4)
def test_experts(rank: int, expert_tensor_parallel_size: int, idle: bool) -> float:
    sizes = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}
    with megatron(**sizes, expert_tensor_parallel_size=expert_tensor_parallel_size) as layers:
        state = layers.state
        mine = state.get_expert_model_parallel_rank()
        model = Experts(layers, mine)
        for name, p in model.named_parameters():
            # Different on every rank that holds another piece, equal wherever Megatron holds copies.
            piece = state.get_tensor_model_parallel_rank()
            if "dense" not in name:
                split = getattr(p, "tensor_model_parallel", False)
                piece = 2 * mine + (state.get_expert_tensor_parallel_rank() if split else 0)
            generator = torch.Generator().manual_seed(10 * len(name) + piece)
            p.grad = torch.randn(p.shape, generator=generator)
            if idle and mine == 1 and "dense" not in name:
                p.grad = None  # no token came to this expert
        annotate(model)

        dense = list(model.dense.parameters())
        experts = [*model.up.parameters(), *model.down.parameters()]
        assert not any(p.allreduce for p in experts)
        # Megatron keeps experts in an optimizer of their own, whose norm is joined with the other.
        expert_group = state.get_expert_tensor_model_pipeline_parallel_group()
        tp_group = state.get_expert_tensor_parallel_group()

        def norm(p: float) -> float:
            of_dense = megatron_norm(dense, p, state.get_model_parallel_group())
            return (of_dense**p + megatron_norm(experts, p, expert_group, tp_group) ** p) ** (1 / p)

        # Of a rank without any gradient, Megatron can take no norm but this one.
        return agreed(model, {p: norm(p) for p in (NORMS[:1] if idle else NORMS)})


@pytest.mark.parametrize("summed", [True, False])
@on_ranks(2)
def test_sequence_parallel_gradients_are_summed_once(rank: int, summed: bool) -> float:
    """By Megatron before, or by distclip."""
    group = mesh1(2, "tp").get_group()
    norm, matrix = nn.LayerNorm(4), nn.Linear(4, 3, bias=False)
    for p in norm.parameters():
        p.sequence_parallel = True  # type: ignore[attr-defined]
    matrix.weight.tensor_model_parallel = True  # type: ignore[assignment]
    torch.manual_seed(7 + rank)
    with torch.no_grad():
        matrix.weight.normal_()
    norm(torch.randn(5, 4)).pow(3).sum().backward()  # this rank's part of the sequence
    matrix.weight.grad = torch.randn(3, 4)

    whole = [p.grad.clone() for p in norm.parameters()]  # type: ignore[union-attr]
    for gradient in whole:
        dist.all_reduce(gradient)
    square = matrix.weight.grad.square().sum()
    dist.all_reduce(square)
    expected = (square + sum(g.square().sum() for g in whole)).sqrt().item()
    if summed:
        for p, gradient in zip(norm.parameters(), whole, strict=True):
            p.grad = gradient.clone()

    annotate(
        [norm, matrix],
        tensor_model_parallel_group=group,
        sequence_parallel_group=None if summed else group,
    )
    found = distclip.total_grad_norm([norm, matrix])
    assert found.item() == pytest.approx(expected, rel=1e-6)
    for p, gradient in zip(norm.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    if not summed:  # saying that somebody has summed them, where nobody has, is found out
        norm.zero_grad()
        norm(torch.randn(5, 4)).pow(3).sum().backward()
        annotate([norm, matrix], tensor_model_parallel_group=group)
        with pytest.raises(distclip.OwnershipError, match="gradient"):
            distclip.Clipper([norm, matrix], distclip.GlobalNorm(1.0)).clip()
    return expected


@on_ranks(2)
def test_float32_copies_of_the_optimizer(rank: int) -> float:
    parameter = nn.Parameter(torch.full((3,), 1.0 + rank, dtype=torch.bfloat16))
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    main = parameter.detach().clone().float()
    parameter.main_param = main  # type: ignore[attr-defined]
    annotate(nn.ParameterList([parameter]), tensor_model_parallel_group=dist.group.WORLD)
    main.grad = torch.full((3,), 2.0 + rank)
    found = distclip.total_grad_norm([main]).item()
    assert found == pytest.approx(39**0.5)  # 3 × 2² + 3 × 3²
    return found


def marked(**attributes: bool) -> nn.Linear:
    module = nn.Linear(2, 2, bias=False)
    for name, value in attributes.items():
        setattr(module.weight, name, value)
    return module


MISSING = [
    ("tensor_model_parallel_group", {"tensor_model_parallel": True}),
    ("expert_parallel_group", {"allreduce": False}),
    ("embedding_group", {"shared": True}),
    ("embedding_group", {"shared_embedding": True}),
]


@pytest.mark.parametrize(("argument", "attributes"), MISSING)
def test_a_group_that_nobody_knows(argument: str, attributes: dict[str, bool]) -> None:
    without = mock.patch.dict(sys.modules, {"megatron.core.parallel_state": None})
    with without, pytest.raises(ModuleNotFoundError, match=f"weight needs {argument}=.*megatron-core"):
        annotate(marked(**attributes))
    uninitialised = SimpleNamespace(model_parallel_is_initialized=lambda: False)
    known = mock.patch("importlib.import_module", return_value=uninitialised)
    with known, pytest.raises(ValueError, match=f"weight needs {argument}=.*initialize_model_parallel"):
        annotate(marked(**attributes))


def test_replicas_need_no_megatron() -> None:
    module = marked(tensor_model_parallel=False, allreduce=True, sequence_parallel=True, shared=False)
    with mock.patch.dict(sys.modules, {"megatron.core.parallel_state": None}):
        annotate(module)
    (row,) = distclip.Clipper(module, distclip.GlobalNorm(1.0)).describe().rows
    assert row.placement == "declared replicated"


def test_no_modules() -> None:
    with pytest.raises(TypeError, match="got Parameter"):
        annotate([nn.Parameter(torch.ones(2))])  # type: ignore[list-item]
