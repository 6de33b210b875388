"""Where in a module something stands, so that it is missed when something else stands there."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass

from torch import Tensor, nn

from distclip.torch_private.modules import CHILDREN, PARAMETERS


@dataclass(frozen=True, eq=False)
class Place:
    """A parameter's or a child's, in the module that holds it. Keeps neither alive."""

    holder: weakref.ref[nn.Module]
    name: str

    def holds(self, thing: Tensor | nn.Module) -> bool:
        holder = self.holder()
        return holder is not None and any(d.get(self.name) is thing for d in _held_by(holder))

    def tensors(self) -> list[Tensor]:
        """What stands there now."""
        holder = self.holder()
        found: list[Tensor] = []
        for thing in [d.get(self.name) for d in _held_by(holder)] if holder is not None else []:
            if thing is not None:
                found += list(thing.parameters()) if isinstance(thing, nn.Module) else [thing]
        return found


_places: dict[int, Place] = {}  # by id of what stands there, as found in the last search
_in_vain: dict[bool, int] = {}  # searches in a row that found nothing, by whether for a module


def place_of(thing: Tensor | nn.Module) -> Place | None:
    """None where no module holds it. Parameters do not know theirs: all modules that there are in this
    process are looked through, once for all that they hold; where that is in vain ever more seldom."""
    place = _places.get(id(thing))
    if place is not None and place.holds(thing):
        return place
    kind = isinstance(thing, nn.Module)
    vain = _in_vain.get(kind, 0)
    place = None
    if vain & (vain - 1) == 0:
        _search()
        place = _places.get(id(thing))
    _in_vain[kind] = 0 if place is not None else vain + 1
    return place


def _search() -> None:
    _places.clear()
    for module in [o for o in gc.get_objects() if issubclass(type(o), nn.Module)]:
        holder = weakref.ref(module)
        for held in _held_by(module):
            _places.update(
                (id(thing), Place(holder, name)) for name, thing in list(held.items()) if thing is not None
            )


def _held_by(module: nn.Module) -> list[dict[str, Tensor | nn.Module | None]]:
    attributes = vars(module)  # of a scripted module they are no dictionaries
    return [d for key in (PARAMETERS, CHILDREN) if isinstance(d := attributes.get(key), dict)]
