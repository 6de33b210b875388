"""Models with gradients, placed over the ranks as real training places them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distclip.bench.shapes import Shape, Shapes
from distclip.torch_private.dtensor import local_of


class Layer(nn.Module):
    """Parameters alone, and a forward pass that gives each a gradient."""

    def __init__(self, shapes: tuple[Shape, ...], device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        for i, shape in enumerate(shapes):
            self.register_parameter(f"p{i}", nn.Parameter(torch.zeros(shape, device=device, dtype=dtype)))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.stack([p.sum() for p in self.parameters()]).sum()


def network(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(*(Layer(layer, device, dtype) for layer in shapes.layers))


@dataclass(eq=False)
class Model:
    """A model whose gradients are there.

    Attributes:
        source: what is handed to :class:`distclip.Clipper`.
        backward: another backward pass, where there is one.
        locals: the gradients on this rank, to be read and refilled.
    """

    source: nn.Module | list[nn.Parameter]
    parameters: list[nn.Parameter]
    backward: Callable[[], None] | None = None

    @property
    def locals(self) -> list[Tensor]:
        found = []
        for parameter in self.parameters:
            gradient: Any = parameter.grad
            if gradient is not None:
                found.append(local_of(gradient))
        return found

    def fill(self) -> None:
        """Normal numbers; equal on replicas."""
        generators: dict[torch.device, torch.Generator] = {}
        for gradient in self.locals:
            if gradient.device not in generators:
                generators[gradient.device] = torch.Generator(gradient.device).manual_seed(0)
            gradient.normal_(generator=generators[gradient.device])


def build(placement: str, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    model = PLACEMENTS[placement][1](shapes, device, dtype)
    model.fill()
    return model


def placements_of(world_size: int) -> list[str]:
    """Those that a world of this size can have."""
    return [name for name, (allows, _) in PLACEMENTS.items() if allows(world_size)]


def _trained(model: nn.Module, device: torch.device) -> Model:
    def backward() -> None:
        model.zero_grad()
        model(torch.zeros((), device=device)).backward()

    backward()
    return Model(model, list(model.parameters()), backward)


def _plain(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    return _trained(network(shapes, device, dtype), device)


def _ddp(shapes: Shapes, device: torch.device, dtype: torch.dtype, views: bool = False) -> Model:
    wrapped = DistributedDataParallel(network(shapes, device, dtype), gradient_as_bucket_view=views)
    return _trained(wrapped, device)


def _ddp_bucket_view(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    return _ddp(shapes, device, dtype, views=True)


def _fsdp1(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    layers = network(shapes, device, dtype)
    wrapped = [FullyShardedDataParallel(layer, device_id=device, use_orig_params=True) for layer in layers]
    model = FullyShardedDataParallel(nn.Sequential(*wrapped), device_id=device, use_orig_params=True)
    return _trained(model, device)


def _fsdp2(
    shapes: Shapes, device: torch.device, dtype: torch.dtype, extent: tuple[int, ...] | None = None
) -> Model:
    mesh = _mesh(device, extent or (dist.get_world_size(),))
    model = network(shapes, device, dtype)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return _trained(model, device)


def _hsdp(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    return _fsdp2(shapes, device, dtype, (2, dist.get_world_size() // 2))


def _tensor_parallel(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    mesh = _mesh(device, (dist.get_world_size(),))
    parameters = []
    for layer in shapes.layers:
        for shape in layer:
            whole = torch.zeros(shape, device=device, dtype=dtype)
            parameter = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
            parameter.grad = distribute_tensor(whole, mesh, [Shard(0)])
            parameters.append(parameter)
    return Model(parameters, parameters)


def _fsdp2_tensor_parallel(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Model:
    mesh = _mesh(device, (dist.get_world_size() // 2, 2))
    model = network(shapes, device, dtype)
    for layer in model:
        for name, parameter in list(layer.named_parameters()):
            layer.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh["tp"], [Shard(0)])))
        fully_shard(layer, mesh=mesh["dp"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return Model(model, list(model.parameters()))


def _mesh(device: torch.device, extent: tuple[int, ...]) -> Any:
    return init_device_mesh(device.type, extent, mesh_dim_names=("dp", "tp")[: len(extent)])


Build = Callable[[Shapes, torch.device, torch.dtype], Model]
PLACEMENTS: dict[str, tuple[Callable[[int], bool], Build]] = {
    "plain": (lambda n: n == 1, _plain),
    "ddp": (lambda n: True, _ddp),
    "ddp_bucket_view": (lambda n: True, _ddp_bucket_view),
    "fsdp1": (lambda n: n > 1, _fsdp1),
    "fsdp2": (lambda n: True, _fsdp2),
    "tensor_parallel": (lambda n: n > 1, _tensor_parallel),
    "hsdp": (lambda n: n >= 4 and n % 2 == 0, _hsdp),
    "fsdp2_tensor_parallel": (lambda n: n >= 4 and n % 2 == 0, _fsdp2_tensor_parallel),
}
