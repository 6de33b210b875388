"""What parameters are called here, where their source may call two alike, or the same one otherwise later."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from itertools import count

from torch import Tensor

from distclip.layout.life import Life, life_of
from distclip.layout.parameters import NamedParameter


class Names:
    """One name for each parameter, for as long as it lives and its source calls it the same."""

    def __init__(self) -> None:
        # By id of the parameter: what its source calls it, and what it is called here.
        self._of: dict[int, tuple[weakref.ref[Life], str, str]] = {}

    def keep(self, tensor: Tensor, called: str, name: str) -> None:
        self._of[id(tensor)] = weakref.ref(life_of(tensor)), called, name

    def told_apart(self, named: Sequence[NamedParameter]) -> list[NamedParameter]:
        """Two models may use the same names: the second to come is ``name#2``. What has a name keeps it while
        its source calls it the same, since state goes on by name."""
        names: dict[int, str] = {}
        for p in named:
            life, called, name = self._of.get(id(p.tensor), (None, "", ""))
            if life is not None and life() is life_of(p.tensor) and called == p.name:
                names[id(p.tensor)] = name
        taken, wanted = set(names.values()), {p.name for p in named}
        for p in named:
            if id(p.tensor) not in names:
                others = (other for n in count(2) if (other := f"{p.name}#{n}") not in wanted)
                name = p.name if p.name not in taken else next(o for o in others if o not in taken)
                taken.add(name)
                names[id(p.tensor)] = name
        self._of = {
            id(p.tensor): (weakref.ref(life_of(p.tensor)), p.name, names[id(p.tensor)]) for p in named
        }
        return [p._replace(name=names[id(p.tensor)]) for p in named]
