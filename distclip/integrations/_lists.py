"""The lists of parameters that a script has its accelerator clip, and what is kept for each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distclip.apply.change import OnNonfinite
from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper, clipping_of
from distclip.current.as_called import AsCalled
from distclip.integrations._stepping import load_if_it_fits
from distclip.layout.parameters import Parameters, bare_tensors, freeze_source, named_parameters, walk_modules
from distclip.layout.placement import MANAGED
from distclip.layout.source import begun_to_train
from distclip.layout.synchronisation import Synchronisation
from distclip.planning.plan import Plan, build_plan
from distclip.strategies._base import Strategy

_MOST_LISTS = 32  # a script clips one or a few


class Lists:
    """What a list is planned for is found again from the lists that the script passes, and dropped by calls
    that it makes: alike on every rank."""

    def __init__(
        self,
        accelerator: Any,
        strategy: Strategy | Callable[[], Strategy] | None,
        on_nonfinite: OnNonfinite,
        options: dict[str, Any],
    ) -> None:
        self._accelerator, self._strategy = accelerator, strategy
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._options = options
        self._lists = OrderedDict[tuple[Any, ...], ClippedList]()  # by the identity of every parameter
        self._count = 0  # of lists made
        self._loaded: list[dict[str, Any]] = []  # states of lists that have not been clipped yet

    def clear(self) -> None:
        self._lists.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"lists": [lst.clipper.state_dict() for lst in self._decided()] + self._loaded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        states = list(state["lists"])
        for lst in self._decided():
            if states:
                load_if_it_fits(lst.clipper, states.pop(0))
        self._loaded = states

    def _decided(self) -> list[ClippedList]:
        """Those that the user's strategy decides for, in order of their first clip."""
        return sorted((lst for lst in self._lists.values() if lst.decided), key=lambda lst: lst.number)

    def of(self, parameters: Parameters, norm_type: float | None) -> ClippedList:
        """What is kept for these parameters. ``norm_type``: the call's, None where the strategy decides."""
        tensors = bare_tensors(freeze_source(parameters, may_be_empty=self._may_be_empty))
        key = (norm_type, *map(id, tensors))
        if key not in self._lists:
            models = self._accelerator._models
            if norm_type is None and (former := self._former(tensors)) is not None:
                self._lists[key] = self._lists.pop(former)
                self._lists[key].hold(tensors, models)
                return self._lists[key]
            left, words = None, ""
            if norm_type is not None:
                left, words = self._with_another_p(key), f"norm_type={norm_type}"
                if left is None and self._options["stages"] is None:
                    left, words = self._left_by(norm_type, set(map(id, tensors))), ""
            self._drop_dead()
            strategy = self._strategy_of_one() if norm_type is None else AsCalled(norm_type)
            self._count += 1
            lst = ClippedList(self._count, tensors, models, strategy, self._on_nonfinite, self._options)
            if left is not None:
                clipping_of(left.clipper).leave(clipping_of(lst.clipper), words)
            if lst.decided and self._loaded:
                load_if_it_fits(lst.clipper, self._loaded.pop(0))
            self._lists[key] = lst
        self._lists.move_to_end(key)
        return self._lists[key]

    def _left_by(self, norm_type: float, ids: set[int]) -> ClippedList | None:
        """A new list has come from the latest that shares parameters with it, or has none that train: ranks
        for which nothing has changed wait in the step of that one, and are to be told."""
        trained = {id(p) for m in self._accelerator._models for p in m.parameters() if p.requires_grad}
        for key, lst in reversed(self._lists.items()):
            if key[0] == norm_type and not (lst.ids.isdisjoint(ids) and not lst.ids.isdisjoint(trained)):
                return lst
        return None

    def _with_another_p(self, key: tuple[Any, ...]) -> ClippedList | None:
        """The latest of these same tensors, in whose step the ranks wait that take the norm as before."""
        return next((lst for k, lst in reversed(self._lists.items()) if k[0] and k[1:] == key[1:]), None)

    def _former(self, tensors: list[Tensor]) -> tuple[Any, ...] | None:
        """The key of the list that the script has changed into this one, whose state goes on: it shares
        parameters, and those that it has beside are in no model any more, or frozen."""
        here = set(map(id, tensors))
        trained = {id(p) for m in self._accelerator._models for p in m.parameters() if p.requires_grad}
        for key, lst in self._lists.items():
            if lst.decided and not lst.ids.isdisjoint(here) and not (lst.ids - here) & trained:
                return key
            if lst.decided and lst.ids.isdisjoint(here) and lst.ids.isdisjoint(trained):
                return key  # all of them replaced, or adapters trained in their place
        return None

    @property
    def _may_be_empty(self) -> bool:
        return self._options["stages"] is not None or self._options["process_group"] is not None

    def _drop_dead(self) -> None:
        """Forget the lists of models that the accelerator has forgotten, and the least used of too many."""
        alive = {id(m) for m in self._accelerator._models}
        for key, lst in list(self._lists.items()):
            if any(id(m) not in alive for m in lst.models):
                del self._lists[key]
        while len(self._lists) >= _MOST_LISTS:
            self._lists.popitem(last=False)

    def _strategy_of_one(self) -> Strategy:
        if not isinstance(self._strategy, Strategy):
            assert self._strategy is not None
            return self._strategy()
        if self._decided() and any(True for _ in self._strategy.buffers()):
            raise ValueError(
                f"another list of parameters has been clipped by this {type(self._strategy).__name__}, whose "
                "state belongs to that one. Pass the same parameters in every step, all of them (frozen ones "
                "cost nothing), or pass install() what makes a strategy for each list, as in "
                f"install(accelerator, distclip.{type(self._strategy).__name__})"
            )
        return self._strategy


class ClippedList:
    """One list of parameters that the script clips.

    Attributes:
        number: its place in the order of first clips.
        models: the prepared models that they belong to.
        decided: whether the user's strategy decides, not the call.
    """

    def __init__(
        self,
        number: int,
        tensors: list[Tensor],
        models: list[nn.Module],
        strategy: Strategy,
        on_nonfinite: OnNonfinite,
        options: dict[str, Any],
    ) -> None:
        self.number = number
        self.decided = not isinstance(strategy, AsCalled)
        self._elementwise: Plan | None = None
        self._synchronisation: Synchronisation | None = None
        self.clipper = Clipper([], strategy, on_nonfinite=on_nonfinite, **options)
        self.hold(tensors, models)

    def hold(self, tensors: list[Tensor], models: list[nn.Module]) -> None:
        """From now on it is these."""
        self.tensors, self.ids = tensors, frozenset(map(id, tensors))
        self.models = [m for m in models if any(id(p) in self.ids for p in m.parameters())]
        self._elementwise, self._synchronisation = None, None
        # Made from a list of parameters, the clipper does not know what synchronises them.
        clipping_of(self.clipper).follow(_named(tensors, self.models), self.models)

    def covers(self, optimizer: torch.optim.Optimizer) -> bool:
        return all(id(p) in self.ids for p in parameters_of(optimizer))

    def seems_unsynchronised(self) -> bool:
        """As far as DDP and FSDP tell, alike on every rank and without asking the others."""
        if self._synchronisation is None:
            self._synchronisation = Synchronisation(self.models, self.tensors)
        found = self._synchronisation
        return (
            found.not_final() is not None
            or found.was_off([t for t in self.tensors if hasattr(t, MANAGED)]) is not None
        )

    def elementwise_plan(self) -> Plan:
        """For changes that need no other rank; the clipper's own plan would ask them."""
        if self._elementwise is None or begun_to_train(self.tensors, self._elementwise.frozen):
            self._elementwise = build_plan(named_parameters(self.tensors), alone=True)
        return self._elementwise


def _named(tensors: list[Tensor], models: list[nn.Module]) -> list[tuple[str, Tensor]]:
    """The parameters with the names that they have in the script's own model; FSDP1's say how they lie."""
    names: dict[int, str] = {}
    for i, model in enumerate(models):
        prefix = f"models[{i}]." if len(models) > 1 else ""
        for p in walk_modules([model]):
            names.setdefault(id(p.tensor), prefix + p.name)
    return [(names.get(id(t), f"parameters[{k}]"), t) for k, t in enumerate(tensors)]
