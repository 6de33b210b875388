"""The optimizer in backward, clipped: each parameter is stepped, and its gradient freed, as it arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from distclip import kernels
from distclip.apply.optimizer_step import take_step
from distclip.decide.norms import Norms
from distclip.decide.report import ClipReport
from distclip.hooks import Handle, require_whole
from distclip.layout.averaging import after_averaging
from distclip.layout.in_backward import STEPPED, require_gradients_after_backward
from distclip.layout.parameters import named_parameters
from distclip.layout.source import begun_to_train, witness_of
from distclip.layout.synchronisation import wrappers
from distclip.measure.gradients import Gradients
from distclip.measure.reduction import News, reduce_message
from distclip.measure.single import Single, coefficient_to, norm_from
from distclip.planning.news import OutdatedPlan
from distclip.planning.plan import build_plan
from distclip.strategies.global_norm import GlobalNorm
from distclip.strategies.per_parameter import PerParameter
from distclip.strategies.value import Value
from distclip.torch_private.ddp import averaged_parameters

InBackwardStrategy = GlobalNorm | PerParameter | Value


class InBackward:
    """Steps every parameter inside ``backward``, on its clipped gradient, and frees that at once.

    So never more than a few gradients exist at a time (FSDP2: those of one module). Every backward pass is
    an optimizer step; there is no ``optimizer.step()`` and no ``zero_grad()``. After each,
    call :meth:`end_step`, on every rank.

    What can be known when a gradient arrives decides how exactly it is clipped:

    - ``Value`` and ``PerParameter`` need this gradient alone: exact.
    - ``GlobalNorm`` needs the norm of all gradients, which is known only when they are gone. It uses that of
      the step before, and what this gradient alone tells:

      .. math:: c_i = \\min(1, \\tau / (n_{t-1} + \\epsilon), \\tau / (\\|g_i\\| + \\epsilon))

      The last term is never below the exact coefficient, and bounds each parameter's clipped norm by τ (all
      together by τ·√parameters) even if this step is a spike; in the first step it is all there is. The
      step after a spike is clipped by the spike's norm.

    Where gradients are synchronised they are clipped after that: FSDP2 runs hooks on the reduced, sharded
    gradient, and under DDP the communication hook steps each bucket once it is averaged (DDP keeps its own
    buffers, so it saves less memory there). A sharded parameter's norm is reduced over its shards as it
    arrives: one all-reduce of one number per parameter and sharded axis.

    A parameter whose gradient is not finite is not stepped, on any rank that holds a part of it. But others
    were stepped before, and others will be: neither those steps nor their optimizers' state can be
    undone. So ``report.skipped`` tells that some parameters were left as they were, not all; the next
    forward pass runs on a mixture.

    Args:
        model: made by DDP or FSDP2 already, if at all. Its parameters that require a gradient now.
        make_optimizer: called with a list of one parameter, for each; e.g.
            ``lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, fused=True)``. A fused optimizer skips
            by itself; another one costs a host synchronisation for each parameter.
        strategy: ``GlobalNorm``, ``PerParameter`` or ``Value``. Schedules advance with each step.
        stages, process_group: as for :class:`distclip.Clipper`.

    Attributes:
        optimizers: by parameter name: for learning rate schedules, which set or step each.

    Raises:
        TypeError: another strategy.
        ValueError: FSDP1, DDP with ``find_unused_parameters=True`` (an unused parameter cannot be told from
            one whose gradient is zero), DDP over parameters that are sharded beside, parameters whose
            gradient is summed after backward, or an optimizer in backward that is there already. From
            backward: a second backward pass before ``end_step()``.
        OwnershipError: on every rank alike: plain parameters differ between ranks.

    Not with a loss scale (use bfloat16), nor with micro-batches, unless DDP's ``no_sync()`` or FSDP2's
    ``set_requires_gradient_sync(False)`` keeps all but the last from synchronising.

    Example:
        >>> in_backward = distclip.InBackward(
        ...     model, lambda p: torch.optim.AdamW(p, lr=3e-4, fused=True), distclip.PerParameter(1.0)
        ... )
        >>> loss.backward()  # steps
        >>> report = in_backward.end_step()
    """

    def __init__(
        self,
        model: nn.Module,
        make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        strategy: InBackwardStrategy,
        *,
        stages: dist.ProcessGroup | DeviceMesh | None = None,
        process_group: dist.ProcessGroup | DeviceMesh | None = None,
    ) -> None:
        if not isinstance(strategy, InBackwardStrategy):
            raise TypeError(
                f"{strategy=}: in backward only GlobalNorm, PerParameter and Value can be used; the others "
                "need the norms of all gradients at once"
            )
        named = named_parameters(model)
        require_gradients_after_backward(named)
        self._model, self._witness = model, witness_of(model)
        synchronised = [m for m in wrappers([model]) if isinstance(m, DistributedDataParallel)]
        for module in synchronised:
            _require_suitable(module)
        self.strategy = strategy
        # [num_parameters], those that train, each once. Raises before any hook is there.
        self._plan = build_plan(named, process_group, stages)
        own = [named[position] for position in self._plan.positions]
        self._singles = [Single(p) for p in own]
        strategy.prepare(self._plan.every)
        strategy.to(self._plan.device)
        self.optimizers = {p.name: make_optimizer([p.tensor]) for p in own}  # type: ignore[list-item]
        self._ordered = list(self.optimizers.values())
        device = self._plan.device
        self._rows = torch.tensor(self._plan.rows, dtype=torch.int64, device=device)
        self._shares = 1.0 / torch.tensor(self._plan.multiplicities, dtype=torch.float64, device=device)
        self._distance = kernels.distance(strategy.norm_type) if self._plan.wide else 0
        self._lines = 2 if self._distance else 1  # numbers that tell of one gradient
        self._nothing = torch.zeros(self._lines, dtype=torch.float64, device=device)
        self._previous = torch.zeros((), dtype=torch.float64, device=device)  # the last finite total norm
        self._begin()

        index = {id(p.tensor): i for i, p in enumerate(own)}
        by_bucket = {id(p) for module in synchronised for p in averaged_parameters(module)}
        removers: list[Callable[[], None]] = [
            after_averaging(module, partial(self._step_bucket, index)).remove for module in synchronised
        ]
        for i, p in enumerate(own):
            setattr(p.tensor, STEPPED, True)
            removers.append(partial(delattr, p.tensor, STEPPED))
            if id(p.tensor) not in by_bucket:
                handle: Any = p.tensor.register_post_accumulate_grad_hook(partial(self._step, i))  # type: ignore[no-untyped-call]
                removers.append(handle.remove)
        self._handle = Handle(removers)
        self._released = [p.tensor for p in own if id(p.tensor) in by_bucket]

    def _begin(self) -> None:
        n = len(self._singles)
        # By parameter, this rank's Σ|g|^p (max|g|) as it arrived and as it was stepped with, and where there
        # is a distance, Σ(|g|/2^distance)^p: [lines] float64.
        self._before: list[Tensor | None] = [None] * n
        self._after: list[Tensor | None] = [None] * n
        self._threshold = self._upcoming_threshold()
        self._coefficient: Tensor | None = None
        if isinstance(self.strategy, GlobalNorm):
            self._coefficient = coefficient_to(self._previous, self._threshold, self.strategy.eps)

    def _upcoming_threshold(self) -> Tensor:
        """[] float32: what the strategy will compare with in this step. Its state stays as it is."""
        buffers = {name: buffer.clone() for name, buffer in self.strategy.named_buffers()}
        one = torch.ones((), dtype=torch.float32, device=self._plan.device)
        threshold: Tensor = self.strategy(Norms(one, one.unsqueeze(0))).threshold
        for name, buffer in self.strategy.named_buffers():
            buffer.copy_(buffers[name])
        return threshold

    def _step_bucket(self, index: Mapping[int, int], bucket: dist.GradBucket) -> None:
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            parameter.grad = gradient  # DDP writes its average there only at the end of backward
            self._step(index[id(parameter)], parameter)

    @torch.no_grad()
    def _step(self, i: int, parameter: Tensor) -> None:
        single, p = self._singles[i], self.strategy.norm_type
        if self._before[i] is not None:
            raise ValueError(
                f"{single.name}: a second backward pass since end_step(). Every backward pass is an "
                "optimizer step: call end_step() after each."
            )
        gradients = single.collect(parameter)
        local = single.power_sums(gradients, p)
        norm = single.norm(local, p)
        clipped = self._clip(gradients, local, norm)
        finite = torch.isfinite(norm)
        self._before[i] = self._told(local)
        self._after[i] = self._told(torch.where(finite, clipped, 0.0))
        take_step(self._ordered[i], ~finite, may_skip=True)
        parameter.grad = None

    def _clip(self, gradients: Gradients, local: Tensor, norm: Tensor) -> Tensor:
        """Clip what this rank holds of one gradient, and return what that makes of its power sum."""
        p, threshold = self.strategy.norm_type, self._threshold.to(norm.device)
        if isinstance(self.strategy, Value):
            for bucket in gradients.buckets:
                kernels.clamp_(bucket.tensors, threshold)
            gradients.commit()
            return torch.minimum(local, threshold)
        coefficient = coefficient_to(norm, threshold, self.strategy.eps)
        if self._coefficient is not None:
            coefficient = torch.minimum(coefficient, self._coefficient.to(norm.device))
        if coefficient.device.type != "cpu" or coefficient.item() != 1:
            for bucket in gradients.buckets:
                kernels.scale_(bucket.tensors, coefficient)
            gradients.commit()
        if math.isinf(p):
            return local * coefficient
        clipped = local * coefficient.double().pow(p)
        # What float64 does not hold of a sum it may well hold once that is clipped.
        clipped[0] = torch.where(
            torch.isinf(local[0]), (norm_from(local, p) * coefficient).pow(p), clipped[0]
        )
        return clipped

    def _told(self, sums: Tensor) -> Tensor:
        """[lines], from those of a parameter that may have more, or fewer."""
        if len(sums) < self._lines:
            return torch.cat([sums, kernels.far_power_sums([], self.strategy.norm_type, sums)])
        return sums[: self._lines]

    @torch.no_grad()
    def end_step(self) -> ClipReport:
        """Close the step that backward has just taken: after every ``backward``, on every rank.

        One all-reduce of two numbers per parameter (four where some are float64), none where all ranks hold
        everything; no host synchronisation.

        Raises:
            ValueError: on every rank: parameters were replaced, added or removed, or have begun to train.

        Returns:
            The true total norm of this step's gradient before clipping, with which ``GlobalNorm`` clips the
            next; ``clipped_norm``, of what was stepped with (what was not stepped counts as 0);
            ``skipped``, whether some parameter was not stepped; and ``param_norms``.
        """
        plan, p = self._plan, self.strategy.norm_type
        size = len(plan.every)
        sums = torch.zeros(2, self._lines, size, dtype=torch.float64, device=plan.device)
        if self._singles:
            for lines, found in zip(sums, (self._before, self._after), strict=True):
                values = [self._nothing if v is None else v.to(plan.device) for v in found]
                for line, of_line in zip(lines, torch.stack(values, dim=1), strict=True):
                    if math.isinf(p):
                        line.scatter_reduce_(0, self._rows, of_line, "amax")
                    else:
                        line.index_add_(0, self._rows, of_line * self._shares)
        tensors = self._witness.tensors(self._model)
        changed = tensors is None or begun_to_train(tensors, plan.frozen)
        try:
            before, after = reduce_message(sums, p, plan.group_name, news=News(outdated=changed))
        except OutdatedPlan:
            changed = True
        if changed:
            raise ValueError(
                "the model's parameters have changed since InBackward was made (here, or on another rank): "
                "those that are new were neither clipped nor stepped. Call remove(), and make a new "
                "InBackward."
            )
        norms = self._norms(before)
        clipped_norm = self._norms(after).reported_total
        total = norms.reported_total
        nonfinite = ~torch.isfinite(norms.total)
        threshold = self.strategy.decide(norms).threshold  # a schedule moves on, unless this was no step
        self._previous = torch.where(nonfinite, self._previous, norms.exact_total)
        for parameter in self._released:
            parameter.grad = None
        self._begin()
        return ClipReport(
            total_norm=total,
            clipped_norm=clipped_norm,
            coefficient=torch.where(clipped_norm == total, 1.0, clipped_norm / total),
            threshold=threshold,
            clipped=(torch.isfinite(norms.slots) & (before != after)).any(),
            nonfinite=nonfinite,
            skipped=(~torch.isfinite(norms.slots)).any(),
            norm_type=p,
            _parameter_norms=norms.reported_slots,
            _parameter_names=plan.names,
        )

    def _norms(self, sums: Tensor) -> Norms:
        far = sums[1] if self._distance else None
        p = self.strategy.norm_type
        return Norms.from_power_sums(sums[0], p, self._plan.names, far, self._distance)

    def remove(self) -> None:
        """Give the gradients back: from now on backward accumulates them in ``.grad`` and steps nothing."""
        self._handle.remove()
        self._released.clear()

    def state_dict(self) -> dict[str, Any]:
        """What has to be saved to continue: the strategy's state, the norm that ``GlobalNorm`` clips the next
        step with, and the optimizers' states by parameter name (of shards: those of this rank)."""
        return {
            "strategy": self.strategy.state_dict(),
            "previous_norm": self._previous.clone(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.strategy.load_state_dict(state["strategy"])
        self._previous = state["previous_norm"].to(self._plan.device, torch.float64)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        self._begin()


def _require_suitable(module: DistributedDataParallel) -> None:
    require_whole(module)
    if module.find_unused_parameters:
        raise ValueError(
            "DDP with find_unused_parameters=True: an unused parameter cannot be told from one whose "
            "gradient is zero, and would be stepped. Freeze what is unused, and leave it False."
        )
