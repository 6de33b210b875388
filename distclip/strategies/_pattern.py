"""Patterns on the names of parameters."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from distclip.decide.parameter_info import ParameterInfo

_TOLD_APART = re.compile(
    r"#\d+$"
)  # what follows the name in all but the first of several that are called alike


class Patterns:
    """The keys by which a strategy chooses parameters: a string is a pattern on their names, as
    :mod:`fnmatch`, an integer the index of an optimizer's parameter group.

    Args:
        what: what they are given as, for the error.
    """

    def __init__(self, what: str, keys: Sequence[str | int]) -> None:
        self._what, self._keys = what, tuple(keys)
        self._fitted: set[str | int] = set()  # those that have fitted some parameter already

    def first(self, parameter: ParameterInfo) -> int | None:
        """The position of the first key that fits, None where none does."""
        return next((i for i, key in enumerate(self._keys) if _fits(key, parameter)), None)

    def require_fit(self, parameters: Sequence[ParameterInfo]) -> None:
        """Of no parameters nothing is asked, and a key that has fitted once may fit nothing later: its
        parameters may have been frozen since. Call it with what all ranks share.

        Raises:
            ValueError: a key fits none of them: names it, and some of the parameters.
        """
        if not parameters:
            return
        fitting = {key for key in self._keys if any(_fits(key, p) for p in parameters)}
        self._fitted |= fitting
        for key in self._keys:
            if key in self._fitted:
                continue
            if isinstance(key, int):
                groups = sorted({p.optimizer_group for p in parameters})
                raise ValueError(
                    f"{self._what}: {key!r} is the index of no parameter group. The parameters that train "
                    f"are in group {', '.join(map(str, groups))}: give the clipper the optimizer, whose "
                    "groups these are, or use patterns on names"
                )
            names = list(dict.fromkeys(p.name for p in parameters))
            more = "" if len(names) <= 6 else f" and {len(names) - 6} more"
            raise ValueError(
                f"{self._what}: the pattern {key!r} fits none of the {len(names)} parameters that train, so "
                f"it would change nothing. Their names are {', '.join(names[:6])}{more}. (Case counts, * "
                "stands for any characters, and parameters that are frozen from the start do not count.)"
            )


def require_fit(strategy: nn.Module, parameters: Sequence[ParameterInfo]) -> None:
    """That each key of a strategy, or of one inside it, fits some of these. Copies of it may then be given
    parts of them, where it fits none.

    Raises:
        ValueError: as :meth:`Patterns.require_fit`.
    """
    for module in strategy.modules():
        patterns = getattr(module, "_patterns", None)
        if isinstance(patterns, Patterns):
            patterns.require_fit(parameters)


def _fits(key: str | int, parameter: ParameterInfo) -> bool:
    if isinstance(key, int):
        return key == parameter.optimizer_group
    name = parameter.name
    return fnmatchcase(name, key) or fnmatchcase(_TOLD_APART.sub("", name), key)
