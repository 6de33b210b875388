"""The life of a tensor, told by something that it carries.

A weak reference to the tensor itself would tell it too, but ``torch.utils.swap_tensors`` refuses tensors that
have one, and ``module.to()`` of DTensors and some ``load_state_dict()`` go through it. It swaps what tensors
carry along with what they hold: a parameter that holds something else by then lives another life.
"""

from __future__ import annotations

from torch import Tensor

_ATTRIBUTE = "_distclip_life"


class Life:
    """Dies with its tensor: refer to it weakly."""

    __slots__ = ("__weakref__", "owner")

    def __init__(self, owner: int) -> None:
        self.owner = owner  # its id: copies of a tensor carry what the tensor carries

    def __reduce__(self) -> tuple[type[complex], tuple[()]]:
        # Whoever loads the tensor needs nothing of ours, and torch.load(weights_only=True) knows it.
        return complex, ()


def life_of(tensor: Tensor) -> Life:
    """The present one, the same at every call."""
    life = getattr(tensor, _ATTRIBUTE, None)
    if type(life) is not Life or life.owner != id(tensor):
        life = Life(id(tensor))
        setattr(tensor, _ATTRIBUTE, life)
    return life
