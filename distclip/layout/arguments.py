"""What users pass to a clipper by mistake, told from what they can mean, before anything communicates.

What can be told is of the program (types, shapes of arguments), so that every rank raises alike.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, ValuesView
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distclip.layout.placement import MANAGED
from distclip.torch_private.fsdp import flat_size


def require_source(parameters: Any) -> None:
    """
    Raises:
        TypeError: nothing that has parameters.
        ValueError: the values of a ``state_dict()``, which are no parameters.
    """
    kind = type(parameters).__name__
    if isinstance(parameters, type):
        raise TypeError(
            f"parameters is the class {parameters.__name__} itself: pass the object that was made of it"
        )
    if not isinstance(parameters, nn.Module) and callable(parameters):
        raise TypeError(
            f"parameters is the {kind} {_named(parameters)} itself: call it, {_named(parameters)}()"
        )
    if isinstance(parameters, Mapping):
        raise TypeError(
            f"parameters is a {kind}: iterating it gives its keys, not its values. Pass the module itself, "
            "model.named_parameters(), or list(parameters.items()) where the values are parameters"
        )
    if isinstance(parameters, str | bytes) or not isinstance(
        parameters, nn.Module | torch.optim.Optimizer | Tensor | Iterable
    ):
        raise TypeError(
            f"parameters={kind}: expected a Module, several Modules, an Optimizer, a Tensor, or an iterable "
            "of Tensors or of (name, Tensor)"
        )
    if isinstance(parameters, list | tuple) and parameters:
        first, whole = parameters[0], "Pass the module itself, or one list of all parameters"
        if isinstance(first, Mapping) and "params" in first:
            raise TypeError(
                f"parameters[0] is a {type(first).__name__} with 'params', as in optimizer.param_groups: "
                "pass the optimizer itself"
            )
        if isinstance(first, torch.optim.Optimizer):
            raise TypeError(
                f"parameters[0] is the optimizer {type(first).__name__}: several cannot be passed. {whole}"
            )
        if isinstance(first, list | dict):
            raise TypeError(f"parameters[0] is a {type(first).__name__}: expected a parameter. {whole}")
        if isinstance(first, str) and len(parameters) == 2:
            raise TypeError("parameters is one (name, Tensor): pass a list of such, [(name, tensor)]")
    if isinstance(parameters, ValuesView):
        tensors = list(parameters)
        if tensors and not any(_may_train(t) for t in tensors):
            raise ValueError(
                f"none of the {len(tensors)} tensors in parameters is a parameter, requires a gradient or "
                "has one: a state_dict() holds detached tensors, on which backward leaves no .grad. Pass the "
                "module itself, or model.parameters()"
            )


def _named(function: Any) -> str:
    return getattr(function, "__name__", "function")


def require_strategy(strategy: Any, strategies: type, parameters: Any) -> None:
    """
    Raises:
        TypeError: it is none of ``strategies``.
    """
    if isinstance(strategy, strategies):
        return
    example = "e.g. distclip.GlobalNorm(1.0)"
    if isinstance(strategy, type) and issubclass(strategy, strategies):
        raise TypeError(
            f"strategy is the class {strategy.__name__} itself: make one, distclip.{strategy.__name__}(...)"
        )
    if isinstance(parameters, strategies):
        raise TypeError(
            f"parameters is the strategy {type(parameters).__name__}: the order is Clipper(model, strategy)"
        )
    if isinstance(strategy, int | float):
        raise TypeError(f"{strategy=}: a threshold is part of a strategy, distclip.GlobalNorm({strategy})")
    raise TypeError(f"strategy is a {type(strategy).__name__}: expected a distclip.Strategy, {example}")


def require_scaler(scaler: Any) -> None:
    """
    Raises:
        TypeError: neither None nor a GradScaler of torch.
    """
    if scaler is None or isinstance(scaler, torch.amp.grad_scaler.GradScaler):
        return
    kind = scaler.__name__ if isinstance(scaler, type) else type(scaler).__name__
    raise TypeError(
        f"scaler is {'the class' if isinstance(scaler, type) else 'a'} {kind}: expected a "
        "torch.amp.GradScaler (or ShardedGradScaler) that has scaled the loss. With any other, unscale the "
        "gradients by its own means, call clipper.clip(), and then its own step"
    )


def _may_train(tensor: Any) -> bool:
    if isinstance(tensor, nn.Parameter | nn.Module) or not isinstance(tensor, Tensor):
        return True
    return tensor.requires_grad or tensor.grad is not None


def require_group(argument: str, given: Any) -> None:
    """``process_group=`` and ``stages=``, in a single process too, where neither would be looked at.

    Raises:
        TypeError: neither a process group nor a mesh.
    """
    if given is None or isinstance(given, DeviceMesh):
        return
    if dist.is_available():
        if isinstance(given, dist.ProcessGroup):
            return
        if given is dist.GroupMember.NON_GROUP_MEMBER:
            raise TypeError(
                f"{argument} is what dist.new_group returns on a rank that is not in the group: pass each "
                "rank the group that it is in"
            )
    hint = ""
    if isinstance(given, Sequence | set | range) and all(isinstance(rank, int) for rank in given):
        hint = f". For these ranks make one on every rank: dist.new_group({list(given)})"
    raise TypeError(f"{argument}={given!r}: expected a ProcessGroup or a 1-D DeviceMesh{hint}")


def as_optimizers(given: Any, *, may_be_empty: bool) -> list[torch.optim.Optimizer]:
    """One optimizer, or several, as a list.

    Raises:
        TypeError: something that is no ``torch.optim.Optimizer``.
        ValueError: none, one twice, or LBFGS.
    """
    if isinstance(given, torch.optim.Optimizer):
        optimizers: list[Any] = [given]
    elif isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | nn.Module | Tensor):
        optimizers = list(given)
    else:
        optimizers = [given]
    for optimizer in optimizers:
        _require_optimizer(optimizer)
    if len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError("step() was given the same optimizer twice: it would take two steps")
    if not optimizers and not may_be_empty:
        raise ValueError(
            "step([]): there is no optimizer to step. Pass it, clipper.step(optimizer), or call "
            "clipper.clip() and step by yourself"
        )
    return optimizers


def _require_optimizer(optimizer: Any) -> None:
    kind = type(optimizer).__name__
    if isinstance(optimizer, type):
        raise TypeError(
            f"step() was given the class {optimizer.__name__}: pass the optimizer that was made of it"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            f"{kind} runs backward several times within one step, between which nobody can clip: call "
            "clipper.clip() at the end of the closure that you pass to optimizer.step(closure)"
        )
    if isinstance(optimizer, torch.optim.Optimizer):
        return
    if isinstance(optimizer, torch.amp.grad_scaler.GradScaler):
        raise TypeError(f"step() was given a {kind} first: the order is clipper.step(optimizer, scaler)")
    if isinstance(optimizer, nn.Module):
        raise TypeError(f"step() was given the module {kind}: pass its optimizer, clipper.step(optimizer)")
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"{kind} is no torch.optim.Optimizer but wraps one ({type(inner).__name__}), and what its step() "
            "does beside is not known here: call clipper.clip() and then its own step() (leaving it out "
            "where report.skipped), or pass what it wraps, clipper.step(wrapper.optimizer)"
        )
    if callable(getattr(optimizer, "step", None)):
        raise TypeError(
            f"{kind} is no torch.optim.Optimizer, so its step cannot be skipped or scaled from here: call "
            "clipper.clip() and then its own step() (leaving it out where report.skipped)"
        )
    raise TypeError(f"step() was given a {kind}: expected a torch.optim.Optimizer, or several")


def as_loss(loss: Any) -> Tensor | None:
    """The loss of this rank's batch as a tensor; a number may be one.

    Raises:
        TypeError: neither a tensor nor a number.
        ValueError: of several elements.
    """
    if loss is None:
        return None
    if isinstance(loss, Tensor):
        if loss.numel() != 1:
            raise ValueError(
                f"loss has shape {tuple(loss.shape)}: expected one number for this rank's batch, loss.mean() "
                "say"
            )
        if loss.is_meta or loss.is_complex():
            what = "is on the meta device, which holds no values" if loss.is_meta else f"is {loss.dtype}"
            raise ValueError(f"loss {what}: expected one real number for this rank's batch")
        return loss
    try:
        return torch.tensor(float(loss), dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        raise TypeError(
            f"loss is a {type(loss).__name__}: expected a tensor of one element, or a number"
        ) from None


def as_count(steps: Any) -> int:
    """Micro-batches in a window.

    Raises:
        TypeError: no whole number.
        ValueError: not positive.
    """
    try:
        count = operator.index(steps)
    except TypeError:
        raise TypeError(f"{steps=}: expected a whole number of micro-batches") from None
    if count < 1:
        raise ValueError(f"{steps=}: expected at least one micro-batch")
    return count


def require_material(names: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """
    Raises:
        ValueError: a parameter has no values, and so can have no gradient that is to be measured; or is a
            part of something else that does not tell which.
    """
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.is_nested and tensor.layout is torch.strided:
            raise ValueError(
                f"{name} is a nested tensor, which has no shape and no rows to speak of: make each of its "
                "parts a parameter of its own"
            )
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{name} has no shape yet: run one forward pass, which makes the parameters of lazy modules, "
                "before the first clip"
            )
        whole = flat_size(tensor)
        if whole is not None and whole.numel() != tensor.numel() and not hasattr(tensor, MANAGED):
            raise ValueError(
                f"{name} is a flat parameter of FSDP1, of which this rank holds {tensor.numel()} of "
                f"{whole.numel()} elements: pass the FullyShardedDataParallel module itself, which knows how "
                "they lie, not its parameters"
            )
        if tensor.is_meta:
            raise ValueError(
                f"{name} (shape {tuple(tensor.shape)}) is on the meta device, which holds no values: bring "
                "the model to a device, model.to_empty(device=...), and load or initialise it before the "
                "first clip"
            )
