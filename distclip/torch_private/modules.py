"""The dictionaries of an ``nn.Module``, and the attributes that wrappers keep the user's module in."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from operator import attrgetter, itemgetter
from typing import Any

from torch import nn

PARAMETERS, CHILDREN = "_parameters", "_modules"
"""The keys in ``vars(module)`` of its own parameters and of its children, by name; None where one was taken
away. In 2.6 already. Scripted modules have something else there, or nothing."""

parameters_of = attrgetter(PARAMETERS)
"""The first, of a module, in C."""

children_of = attrgetter(CHILDREN)
"""The second."""

held_by = itemgetter(PARAMETERS, CHILDREN)
"""Both, from ``vars(module)``, in C."""


def persistent_buffers(module: nn.Module) -> AbstractSet[str]:
    """The names of its own buffers that a ``state_dict()`` has. In 2.6 already."""
    return module._buffers.keys() - module._non_persistent_buffers_set


def transient_buffers(module: nn.Module) -> AbstractSet[str]:
    """Of those that it has not. In 2.6 already."""
    return module._non_persistent_buffers_set


WRAPPERS: dict[str, tuple[tuple[str, str], ...]] = {
    "module": (
        ("torch.nn.parallel.distributed", "DistributedDataParallel"),
        ("torch.nn.parallel.data_parallel", "DataParallel"),
    ),
    "_fsdp_wrapped_module": (
        ("torch.distributed.fsdp.fully_sharded_data_parallel", "FullyShardedDataParallel"),
    ),
    "_orig_mod": (("torch._dynamo.eval_frame", "OptimizedModule"),),
    "_checkpoint_wrapped_module": (
        ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper"),
    ),
}
"""Where wrappers keep the user's module: the attribute, and the class that it is an attribute of, which does
not exist before its file has been imported. In 2.6 already, all of them."""


def wrapper_classes(attribute: str, imported: dict[str, Any]) -> tuple[type, ...]:
    """Those in ``imported``, which is ``sys.modules``, that keep the user's module under this name."""
    kinds = (getattr(imported.get(file), kind, None) for file, kind in WRAPPERS.get(attribute, ()))
    return tuple(kind for kind in kinds if kind is not None)
