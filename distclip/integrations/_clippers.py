"""The clippers of a Trainer: one for the parameters of each optimizer, as they are at each step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from distclip.apply.change import OnNonfinite
from distclip.apply.optimizer_step import parameters_of
from distclip.clipper import Clipper, clipping_of
from distclip.inspection.advice import is_main_rank, logger
from distclip.integrations._stepping import load_if_it_fits
from distclip.layout.parameters import named_parameters
from distclip.layout.source import Witness, witness_of
from distclip.strategies._base import Strategy
from distclip.strategies._pattern import require_fit
from distclip.torch_private.operators import tree_map


class Clippers:
    """Made at the first step of each optimizer, with the strategy that is its own.

    Attributes:
        made: by index of the optimizer.
        uses_loss: whether any strategy judges it.
    """

    def __init__(
        self,
        strategy: Strategy | Sequence[Strategy],
        on_nonfinite: OnNonfinite,
        apply: Literal["inplace", "deferred"],
    ) -> None:
        each = [strategy] if isinstance(strategy, Strategy) else strategy
        if not isinstance(each, list | tuple) or not each or not all(isinstance(s, Strategy) for s in each):
            raise TypeError(
                f"{strategy=}: expected a distclip.Strategy, e.g. distclip.GlobalNorm(1.0), or a list of one "
                "for each optimizer"
            )
        self._strategy = strategy
        self._on_nonfinite: OnNonfinite = on_nonfinite
        self._apply: Literal["inplace", "deferred"] = apply
        self.uses_loss = any(s.uses_loss for s in each)
        self.made: dict[int, Clipper] = {}
        self._loaded: dict[int, dict[str, Any]] = {}  # states whose clippers are not made yet
        # By index, of the optimizer and the model: what they held when the clipper was given it.
        self._witnesses: dict[int, tuple[Witness, Witness]] = {}

    def begin_anew(self) -> None:
        """Another fit: other parameters, the same strategy."""
        self._loaded, self.made = self.state_dict()["clippers"], {}
        self.let_go()

    def let_go(self) -> None:
        """Of the parameters."""
        self._witnesses = {}

    def require_fit(self, optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
        """
        Raises:
            ValueError: not as many strategies as optimizers, or a pattern fits no parameter of any.
        """
        if not isinstance(self._strategy, Strategy):
            if len(self._strategy) != len(optimizers):
                raise ValueError(
                    f"ClipGradients has {len(self._strategy)} strategies, and configure_optimizers returns "
                    f"{len(optimizers)} optimizers: give one strategy for each, or one for all"
                )
            return
        self._fresh = copy.deepcopy(self._strategy)
        if len(optimizers) > 1:
            held = {id(p) for o in optimizers for p in parameters_of(o)}
            named = named_parameters(model)
            require_fit(
                self._fresh, [p.info for p in named if p.tensor.requires_grad and id(p.tensor) in held]
            )

    def of(
        self,
        optimizer: torch.optim.Optimizer,
        configured: Sequence[torch.optim.Optimizer],
        others: Sequence[torch.optim.Optimizer],
        model: nn.Module,
    ) -> tuple[int, Clipper]:
        """The index of an optimizer among the ``configured`` and, behind them, the ``others``; and the
        clipper of its parameters."""
        index = next(i for i, known in enumerate([*configured, *others]) if known is optimizer)
        if index not in self.made:
            strategy = self._strategy_of(index, alone=len(configured) < 2)
            clipper = Clipper([], strategy, on_nonfinite=self._on_nonfinite, apply=self._apply)
            if index in self._loaded:
                load_if_it_fits(clipper, self._loaded.pop(index))
            self.made[index] = clipper
        self._follow(index, optimizer, model)
        return index, self.made[index]

    def state_dict(self) -> dict[str, Any]:
        states = {index: clipper.state_dict() for index, clipper in self.made.items()}
        # On the CPU: Lightning loads what goes with a sharded checkpoint to where it was saved from.
        states = tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, states)
        return {"clippers": self._loaded | states}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._loaded = dict(state_dict["clippers"])
        for index, clipper in self.made.items():
            if index in self._loaded:
                load_if_it_fits(clipper, self._loaded.pop(index))

    def _strategy_of(self, index: int, *, alone: bool) -> Strategy:
        if not isinstance(self._strategy, Strategy):
            if index < len(self._strategy):
                return self._strategy[index]
            raise ValueError(
                f"ClipGradients has {len(self._strategy)} strategies, one for each optimizer of "
                "configure_optimizers, and another optimizer steps: return that from configure_optimizers "
                "too, or give one strategy for all"
            )
        if index == 0 and alone:
            return self._strategy
        return copy.deepcopy(self._fresh)

    def _follow(self, index: int, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        """Give the clipper the parameters that ``optimizer`` holds now, by their names in ``model``."""
        before = self._witnesses.get(index)
        if before is not None:
            of_optimizer, of_model = before
            if of_optimizer.tensors(optimizer) is not None and of_model.tensors(model) is not None:
                return
        held = {id(p): p for p in parameters_of(optimizer)}
        named = [
            (p.name, p.tensor) for p in named_parameters(model) if held.pop(id(p.tensor), None) is not None
        ]
        if held and before is not None and is_main_rank():
            logger.warning(
                "%s still holds %d parameters (the first of shape %s) that are not in %s any more: what has "
                "taken their place is trained only once the optimizer holds it (optimizer.add_param_group).",
                type(optimizer).__name__, len(held), tuple(next(iter(held.values())).shape),
                type(model).__name__,
            )  # fmt: skip
        named += [(f"not in the module[{i}]", p) for i, p in enumerate(held.values())]
        clipping_of(self.made[index]).follow(named, [model])
        self._witnesses[index] = witness_of(optimizer), witness_of(model)
