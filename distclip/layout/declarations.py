"""What users have declared, by the names in their modules and by parameter, for as long as these live."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from distclip.layout.life import Life, life_of
from distclip.layout.parameters import NamedParameter, walk_modules
from distclip.layout.placement import SUMMED, Declaration
from distclip.layout.places import Place, place_of

_of_modules: weakref.WeakKeyDictionary[nn.Module, dict[str, Declaration]] = weakref.WeakKeyDictionary()
_of_parameters: dict[int, _OfParameter] = {}  # by id, for as long as it lives
_sums_forgotten: dict[int, weakref.ref[Life]] = {}  # by id of those whose hook is there

made = 0
"""Declarations so far: a plan that was made before the last of them may be out of date."""
# Where parameters and modules stood that have died, and what was declared of them.
_lost: list[tuple[Place, str]] = []


def add_to_module(module: nn.Module, declaration: Declaration) -> None:
    """For every parameter that is in ``module`` now, by name."""
    add_to_names(module, {p.name: declaration for p in walk_modules([module])})


def add_to_names(module: nn.Module, declarations: Mapping[str, Declaration]) -> None:
    global made
    of_module = _of_modules.setdefault(module, {})
    for name, declaration in declarations.items():
        made += 1
        of_module[name] = replace(declaration, number=made)
    if not isinstance(vars(module).get(_COMPANION), _Companion):
        label = next((d.label for d in declarations.values()), "declared")
        vars(module)[_COMPANION] = _Companion(module, place_of(module), label)


def add_to_parameter(parameter: Tensor, declaration: Declaration) -> None:
    global made
    made += 1
    key, place, label = id(parameter), place_of(parameter), declaration.label

    def forget(_: object) -> None:
        _of_parameters.pop(key, None)
        _miss(place, label)

    _of_parameters[key] = _OfParameter(
        weakref.ref(life_of(parameter), forget), replace(declaration, number=made)
    )


_COMPANION = "_distclip_declared"


class _Companion:
    """An attribute of a module of which something is declared, that goes where the module goes.

    A deep copy of the module is declared as the module is. What is loaded from a pickle is mostly in another
    process, with other groups: it has a text here that tells what was declared.
    """

    def __init__(self, module: nn.Module, place: Place | None = None, label: str = "") -> None:
        self._module = weakref.ref(module)
        weakref.finalize(module, _miss, place, label).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Companion | None:
        module = self._module()
        copy = memo.get(id(module))
        if module is None or copy is None:
            return None
        _of_modules[copy] = dict(_of_modules.get(module, {}))
        return _Companion(copy)

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        module = self._module()
        declared = {} if module is None else _of_modules.get(module, {})
        told = [f"{name!r} of {type(module).__name__} ({d.label})" for name, d in declared.items()]
        return str, (", ".join(told[:2]) + (", …" if told[2:] else ""),)


def _miss(place: Place | None, label: str) -> None:
    if place is not None and place.holder() is not None:  # else the whole model goes
        _lost.append((place, label))


def require_none_pickled(modules: Sequence[nn.Module]) -> None:
    """
    Raises:
        ValueError: a module was declared in another process.
    """
    for module in modules:
        for inside in module.modules():
            told = vars(inside).get(_COMPANION)
            if isinstance(told, str) and inside not in _of_modules:
                raise ValueError(
                    f"what was declared of {told} cannot be kept: the module comes from a pickle, and "
                    "groups belong to the process. Declare it anew."
                )


@dataclass
class _OfParameter:
    life: weakref.ref[Life]
    declaration: Declaration


class Declared:
    """What is declared of some parameters, as things stand now.

    Attributes:
        of: by the id of the parameter.
        by_object: names of those that it was said of as objects.

    Raises:
        ValueError: something was declared of a name or of a parameter that is there no more.
    """

    def __init__(self, parameters: Sequence[NamedParameter]) -> None:
        self.made = made
        self.of: dict[int, Declaration] = {}
        mine = {id(p.tensor): p for p in parameters}
        lost = None
        for module, declarations in list(_of_modules.items()):
            present = {p.name: p.tensor for p in walk_modules([module])}
            concerned = any(id(t) in mine for t in present.values())
            for name, declaration in declarations.items():
                tensor = present.get(name)
                if tensor is None:
                    lost = f"{name!r} of {type(module).__name__} ({declaration.label})" if concerned else lost
                elif id(tensor) in mine:
                    self._add(tensor, declaration)
        if lost is not None:
            raise ValueError(
                f"what was declared of {lost} cannot be kept: the module has no parameter of that name any "
                "more. Declare anew what has taken its place."
            )
        self.by_object = set[str]()
        for p in parameters:
            own = _of_parameters.get(id(p.tensor))
            if own is not None and self._add(p.tensor, own.declaration):
                self.by_object.add(p.name)
        self._require_none_lost(parameters)
        for p in parameters:
            declared = self.of.get(id(p.tensor))
            if declared is not None and declared.partial and id(p.tensor) not in _sums_forgotten:
                _sums_forgotten[id(p.tensor)] = weakref.ref(
                    life_of(p.tensor), partial(_unhooked, id(p.tensor))
                )
                p.tensor.register_post_accumulate_grad_hook(_forget_sum)  # type: ignore[no-untyped-call]

    def _add(self, tensor: Tensor, declaration: Declaration) -> bool:
        """The latest counts."""
        known = self.of.get(id(tensor))
        if known is not None and known.number > declaration.number:
            return False
        self.of[id(tensor)] = declaration
        return True

    def _require_none_lost(self, parameters: Sequence[NamedParameter]) -> None:
        names = {id(p.tensor): p.name for p in parameters if id(p.tensor) not in self.of} if _lost else {}
        for lost in list(_lost):
            place, label = lost
            if place.holder() is None:
                _lost.remove(lost)
            for name in [names[id(t)] for t in place.tensors() if id(t) in names]:
                raise ValueError(
                    f"{name} has taken the place of a parameter that was {label} and is gone, and nothing is "
                    "declared of it: load_state_dict(assign=True), to_empty() and fully_shard put others in "
                    "the place of parameters. Declare it now, or declare the module, whose names stay. "
                    "(declare(parameter, sharded_over=()) says that it is an ordinary replica.)"
                )


def _unhooked(key: int, _: object) -> None:
    _sums_forgotten.pop(key, None)


def _forget_sum(parameter: Tensor) -> None:
    """Backward has added this rank's part to the gradient, so it has to be summed (again)."""
    setattr(parameter, SUMMED, None)
