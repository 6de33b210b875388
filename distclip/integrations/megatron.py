"""Megatron-LM: what the attributes of its parameters say, declared."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from distclip.ownership import Group, declare


def annotate(
    model_or_modules: nn.Module | Iterable[nn.Module],
    *,
    tensor_model_parallel_group: Group | None = None,
    sequence_parallel_group: Group | None = None,
    expert_parallel_group: Group | None = None,
    expert_tensor_parallel_group: Group | None = None,
    embedding_group: Group | None = None,
) -> None:
    """Declare every parameter of a Megatron model by the attributes that Megatron has set on it.

    Megatron's ``get_grad_norm_fp32`` adds up, over the model-parallel ranks, the gradients that pass
    ``param_is_not_shared`` and ``param_is_not_tensor_parallel_duplicate`` (those on tensor-parallel rank 0,
    or marked ``tensor_model_parallel``). The same attributes say here which ranks hold what:

    ==============================  ======================================================================
    attribute                       declared as
    ==============================  ======================================================================
    ``tensor_model_parallel=True``  sharded over the tensor-parallel group (``partition_dim`` says along
                                    which dimension, which no norm depends on)
    ``allreduce=False``             an expert: sharded over the expert-parallel group, and if
                                    ``tensor_model_parallel`` over the expert-tensor-parallel group too
    ``sequence_parallel=True``      a replica, whose gradient Megatron's ``finalize_model_grads`` has
                                    summed over the tensor-parallel group before anything is clipped;
                                    where nobody has, pass ``sequence_parallel_group=``
    ``shared=True`` or              the word embedding, of which the first and the last pipeline stage
    ``shared_embedding=True``       hold copies: tied over the embedding group, so it counts once
    none of these                   a replica
    ==============================  ======================================================================

    Call it once, on every rank, after the model is built (and after the optimizer, where that keeps
    float32 copies of the parameters: each copy lies as its ``param.main_param`` says). distclip reads
    ``.grad``: under Megatron's own optimizer, that is what ``optimizer.prepare_grads()`` leaves on
    ``optimizer.get_parameters()``. Its *distributed* optimizer cuts the copies into further shards, of which
    the attributes say nothing: they are not declared, and clipping them is an ``OwnershipError``.

    Args:
        model_or_modules: the model, or its chunks (Megatron's models are lists of them).
        tensor_model_parallel_group, expert_parallel_group, expert_tensor_parallel_group, embedding_group:
            asked of ``megatron.core.parallel_state`` where they are needed and not given. Without an
            initialised one, experts count as whole unless ``expert_tensor_parallel_group`` is given.
        sequence_parallel_group: the group over which the gradients of ``sequence_parallel=True`` parameters
            have *not* been summed yet: distclip sums them. None: they have been.

    Raises:
        ValueError: a parameter needs a group that is neither given nor known to ``parallel_state``.
        ModuleNotFoundError: the same, and ``megatron-core`` is not installed.
        TypeError: something that is no module was passed.

    Example:
        >>> annotate(model)
        >>> clipper = distclip.Clipper(
        ...     model, distclip.GlobalNorm(1.0), stages=parallel_state.get_pipeline_model_parallel_group()
        ... )
    """
    modules = [model_or_modules] if isinstance(model_or_modules, nn.Module) else list(model_or_modules)
    if wrong := [type(m).__name__ for m in modules if not isinstance(m, nn.Module)]:
        raise TypeError(f"expected a Module or several Modules, got {wrong[0]} among them")
    if expert_tensor_parallel_group is None and (state := _parallel_state(required_for=None)) is not None:
        expert_tensor_parallel_group = state.get_expert_tensor_parallel_group()
    for name, parameter in (named for m in modules for named in m.named_parameters()):
        split = getattr(parameter, "tensor_model_parallel", False)
        expert = not getattr(parameter, "allreduce", True)
        shards: list[Group] = []
        if expert:
            shards.append(
                expert_parallel_group
                or _known("expert_parallel_group", "get_expert_model_parallel_group", name)
            )
            if split and expert_tensor_parallel_group is not None:
                shards.append(expert_tensor_parallel_group)
        elif split:
            shards.append(
                tensor_model_parallel_group
                or _known("tensor_model_parallel_group", "get_tensor_model_parallel_group", name)
            )
        tied = None
        if getattr(parameter, "shared", False) or getattr(parameter, "shared_embedding", False):
            tied = embedding_group or _known("embedding_group", "get_embedding_group", name)
        partial = None
        if getattr(parameter, "sequence_parallel", False) and not expert:
            partial = sequence_parallel_group
        for tensor in _with_main_copy(parameter):
            declare(tensor, sharded_over=shards, partial_over=partial, tied_over=tied)


def _with_main_copy(parameter: Tensor) -> list[Tensor]:
    """A parameter, and the float32 copy of it that the optimizer works on, where there is one."""
    main = getattr(parameter, "main_param", None)
    return [parameter] if main is None or main.shape != parameter.shape else [parameter, main]


def _known(argument: str, getter: str, name: str) -> Any:
    """The group that Megatron has made, for a parameter that needs it."""
    return getattr(_parallel_state(required_for=f"{name} needs {argument}="), getter)()


def _parallel_state(required_for: str | None) -> Any:
    """Megatron's, if it is initialised; otherwise None, or an error where something needs it."""
    try:
        state = importlib.import_module("megatron.core.parallel_state")
    except ModuleNotFoundError as error:
        if required_for is None:
            return None
        raise ModuleNotFoundError(
            f"{required_for}, and without megatron.core there is no default for it: pass it, or "
            "`pip install 'distclip[megatron]'`"
        ) from error
    if state.model_parallel_is_initialized():
        return state
    if required_for is None:
        return None
    raise ValueError(
        f"{required_for}: pass it, or call megatron.core.parallel_state.initialize_model_parallel() first"
    )
