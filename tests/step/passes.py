"""What a step moves, counted: passes over the gradients, by bytes, and host syncs.

python -m tests.step.passes      # distclip beside torch's own sequence
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distclip
from tests.counting import count_host_syncs


class count_bytes(TorchDispatchMode):  # reads as a verb in `with`
    """Counts how often every byte of the gradients is read and written, by operator.

    An operator reads the gradient memory among its arguments, and writes that which its schema says it
    changes (reading it as well, unless it only fills or copies). Views cost nothing. What is written back by
    a fused optimizer that gets a grad_scale, and its read, are counted under its own name.
    """

    _FILLS = ("copy_", "fill_", "zero_")

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        gradients = [p.grad for p in parameters if p.grad is not None]
        self._memory = {g.untyped_storage().data_ptr() for g in gradients}
        self._bytes = sum(g.numel() * g.element_size() for g in gradients)
        self.reads: dict[str, float] = {}
        self.writes: dict[str, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        schema = func._schema
        if not _is_view(schema):
            given = [*zip(schema.arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in schema.arguments if kwargs and a.name in kwargs]
            for argument, value in given:
                share = sum(map(self._share, tree_leaves(value)))
                if not share:
                    continue
                writes = argument.alias_info is not None and argument.alias_info.is_write
                if writes and (not name.startswith("_fused") or _scales(kwargs)):
                    self.writes[name] = self.writes.get(name, 0.0) + share
                if not writes or not name.endswith(self._FILLS):
                    self.reads[name] = self.reads.get(name, 0.0) + share
        return func(*args, **(kwargs or {}))

    def _share(self, value: Any) -> float:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return 0.0
        if value.untyped_storage().data_ptr() not in self._memory:
            return 0.0
        return value.numel() * value.element_size() / self._bytes

    @property
    def beside_optimizer(self) -> tuple[float, float]:
        """Reads and writes of the gradients, in passes over all of them, outside the optimizer's own step."""
        own = ("_fused", "_foreach_lerp", "_foreach_addcmul")
        return tuple(  # type: ignore[return-value]
            round(sum(n for op, n in counts.items() if not op.startswith(own)), 6)
            for counts in (self.reads, self.writes)
        )

    @property
    def in_optimizer(self) -> tuple[float, float]:
        return tuple(  # type: ignore[return-value]
            round(sum(n for op, n in counts.items() if op.startswith("_fused")), 6)
            for counts in (self.reads, self.writes)
        )


def _is_view(schema: Any) -> bool:
    """Whether the result shares memory with an argument that is not changed."""
    aliases = [a.alias_info for a in (*schema.arguments, *schema.returns) if a.alias_info is not None]
    return bool(aliases) and not any(a.is_write for a in aliases)


def _scales(kwargs: Any) -> bool:
    return bool(kwargs) and kwargs.get("grad_scale") is not None


@dataclass(frozen=True)
class Cost:
    """Of one step. Passes over all gradients: (reads, writes)."""

    beside_optimizer: tuple[float, float]
    in_optimizer: tuple[float, float]
    host_syncs: int


Step = Callable[[torch.optim.Optimizer, GradScaler | None, nn.Module], Any]


def torchs_own(max_norm: float) -> Step:
    def step(opt: torch.optim.Optimizer, scaler: GradScaler | None, net: nn.Module) -> None:
        if scaler is not None:
            scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(net.parameters(), max_norm)
        if scaler is None:
            opt.step()
        else:
            scaler.step(opt)
            scaler.update()

    return step


def ours(net: nn.Module, max_norm: float, apply: Any) -> Step:
    clipper = distclip.Clipper(net, distclip.GlobalNorm(max_norm), apply=apply)
    return lambda opt, scaler, _: clipper.step(opt, scaler)


def cost_of(who: str, *, scaled: bool, fused: bool, max_norm: float) -> Cost:
    """Of the third step (the first ones make plans and optimizer state), for AdamW and a small model."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(8, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 8))
    opt = torch.optim.AdamW(net.parameters(), lr=1e-3, fused=fused)
    scaler = GradScaler("cpu", init_scale=2.0**8) if scaled else None
    step = torchs_own(max_norm) if who == "torch" else ours(net, max_norm, who)
    for _ in range(3):
        opt.zero_grad()
        loss = net(torch.randn(4, 8)).pow(2).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()  # type: ignore[union-attr]
        before = [p.grad for p in net.parameters()]
        with count_bytes(net.parameters()) as passes, count_host_syncs() as syncs:
            step(opt, scaler, net)
        assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
    return Cost(passes.beside_optimizer, passes.in_optimizer, syncs.count)


CLIPS, DOES_NOT = 1e-2, 1e6  # max_norm


def table() -> str:
    lines = [
        "AdamW(fused=True), CPU         | clips | beside the optimizer | in the optimizer | host syncs",
        "                               |       | reads  writes        | reads  writes    |",
    ]
    for scaled in (False, True):
        for who in ("torch", "inplace", "deferred"):
            for max_norm in (CLIPS, DOES_NOT):
                cost = cost_of(who, scaled=scaled, fused=True, max_norm=max_norm)
                name = f"{'torch' if who == 'torch' else f'distclip, {who}'}{', GradScaler' * scaled}"
                (r, w), (ro, wo) = cost.beside_optimizer, cost.in_optimizer
                lines.append(
                    f"{name:30} | {'yes' if max_norm == CLIPS else 'no':5} | {r:5g}  {w:6g}        | "
                    f"{ro:5g}  {wo:6g}    | {cost.host_syncs}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
