"""The comparison of a plan's copies at a later step: by the gradients that they have then."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distclip.errors import OwnershipError
from distclip.planning.agreement import REMEDIES, hash_of_settings, require_same_settings
from distclip.planning.evidence import gradient_prints
from distclip.planning.fingerprint import TOLERANCE, WORDS
from distclip.planning.news import OutdatedPlan
from distclip.planning.plan import Plan


def require_equal_gradients(
    plan: Plan, tensors: Sequence[Tensor] | None = None, settings: Mapping[str, str] | None = None
) -> None:
    """Compare the gradients of plain copies between ranks, as they are now, and the settings. One all-reduce;
    none where no rank has any.

    ``tensors``, ``settings``: None tells the others that this rank's parameters have changed.

    Raises:
        OwnershipError, SettingsError, OutdatedPlan: on every rank in scope alike.
    """
    if plan.compared == ():
        return
    group, names, device = plan.scope.group(), plan.names, plan.device
    assert group is not None
    message = torch.full((2 * WORDS, len(names) + 1), -math.inf, dtype=torch.float64, device=device)
    if tensors is not None:
        own = [tensors[i] for i in plan.positions]
        prints = gradient_prints(own, plan.placements, plan.compared or (), device)
        message[:, list(plan.rows)] = torch.cat([prints, -prints], dim=1).T.nan_to_num(nan=-math.inf)
    if settings is not None:
        configured = hash_of_settings(settings)
        message[:WORDS, -1], message[WORDS:, -1] = configured, -configured
    else:
        message[:WORDS, -1] = math.inf  # which is no settings' hash
    dist.all_reduce(message, op=dist.ReduceOp.MAX, group=group)
    message = message.cpu()
    if message[0, -1] == math.inf:
        raise OutdatedPlan(everyone=bool(message[WORDS, -1] == -math.inf))
    spread = message[:WORDS] + message[WORDS:]
    if spread[0, -1] > 0:
        require_same_settings(settings or {}, group, device)
    spread = spread[:, :-1]
    differing = (spread > TOLERANCE).any(dim=0).nonzero().flatten().tolist()
    if differing:
        more = f" ({len(differing)} parameters are affected)" if len(differing) > 1 else ""
        raise OwnershipError(
            f"the gradient of parameter {names[differing[0]]!r} differs between ranks that should hold "
            f"copies of it{more}. If these are replicas, it has not been synchronised: synchronise in the "
            "last micro-batch (clipper.accumulate does), after no_sync() and "
            f"set_requires_gradient_sync(False), then clip. Otherwise they are no replicas. {REMEDIES}"
        )
    plan.rounding.say(spread.T, names, plan.scope)
