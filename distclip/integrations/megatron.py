"""Megatron-LM: what the attributes of its parameters say, declared."""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from distclip.layout.declarations import add_to_names
from distclip.layout.parameters import walk_modules
from distclip.ownership import Group, declaration_of, declare


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

    Call it on every rank before the first clip, after the model is built (and the optimizer, where that keeps
    float32 copies of the parameters, ``param.main_param``: they are declared too). distclip reads
    ``.grad``: under Megatron's own optimizer, that is what ``optimizer.prepare_grads()`` leaves on
    ``optimizer.get_parameters()``. Its *distributed* optimizer cuts the copies into further shards, of which
    the attributes say nothing: they are not declared, and clipping them is an ``OwnershipError``.

    Args:
        model_or_modules: the model, or its chunks (Megatron's models are lists of them).
        tensor_model_parallel_group, expert_parallel_group, expert_tensor_parallel_group, embedding_group:
            where needed and not given, those of ``megatron.core.parallel_state``. An
            ``expert_parallel_group`` given alone says that each expert is whole.
        sequence_parallel_group: the group over which the gradients of ``sequence_parallel=True`` parameters
            have *not* been summed yet: distclip sums them. None: they have been.

    Raises:
        ValueError: a parameter needs a group that is not given, and ``parallel_state`` is not initialised.
        ModuleNotFoundError: the same, and ``megatron-core`` is not even installed.
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
    for module, (name, parameter, _) in ((m, named) for m in modules for named in walk_modules([m])):
        split = getattr(parameter, "tensor_model_parallel", False)
        shards: list[Group] = []
        tied = partial = None
        if not getattr(parameter, "allreduce", True):
            shards.append(_group("expert_parallel_group", expert_parallel_group, name))
            etp = expert_tensor_parallel_group
            if split and (etp is not None or expert_parallel_group is None):
                shards.append(_group("expert_tensor_parallel_group", etp, name))
        else:
            if split:
                shards.append(_group("tensor_model_parallel_group", tensor_model_parallel_group, name))
            if getattr(parameter, "sequence_parallel", False):
                partial = sequence_parallel_group
        if getattr(parameter, "shared", False) or getattr(parameter, "shared_embedding", False):
            tied = _group("embedding_group", embedding_group, name)
        declaration = declaration_of(sharded_over=shards, partial_over=partial, tied_over=tied)
        add_to_names(module, {name: declaration})
        main = getattr(parameter, "main_param", None)  # the optimizer's float32 copy
        if main is not None and main.shape == parameter.shape:
            declare(main, sharded_over=shards, tied_over=tied)


_GETTERS = {
    "tensor_model_parallel_group": "get_tensor_model_parallel_group",
    "expert_parallel_group": "get_expert_model_parallel_group",
    "expert_tensor_parallel_group": "get_expert_tensor_parallel_group",
    "embedding_group": "get_embedding_group",
}


def _group(argument: str, given: Group | None, name: str) -> Group:
    """The group that the parameter of that name needs: as given, else the one that Megatron has made."""
    if given is not None:
        return given
    try:
        state = importlib.import_module("megatron.core.parallel_state")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name} needs {argument}=, which has no default where megatron.core is not installed: pass it, "
            "or `pip install megatron-core`"
        ) from error
    if not state.model_parallel_is_initialized():
        raise ValueError(
            f"{name} needs {argument}=: pass it, or call "
            "megatron.core.parallel_state.initialize_model_parallel() first"
        )
    group: dist.ProcessGroup = getattr(state, _GETTERS[argument])()
    return group
