"""Noticing that parameters are stepped during backward, which leaves no gradient to clip after it."""

from __future__ import annotations

from collections.abc import Sequence

from distclip.layout.parameters import NamedParameter
from distclip.torch_private.optimizers import steps_in_backward

# Attribute of a parameter that distclip.InBackward steps.
STEPPED = "_distclip_in_backward"


def uses_optimizer_in_backward(parameters: Sequence[NamedParameter]) -> str | None:
    """The name of the first parameter whose optimizer runs in backward, or None.

    Knows ``torch.distributed.optim._apply_optimizer_in_backward`` and ``distclip.InBackward``.
    """
    for parameter in parameters:
        if steps_in_backward(parameter.tensor) or hasattr(parameter.tensor, STEPPED):
            return parameter.name
    return None


def require_gradients_after_backward(parameters: Sequence[NamedParameter]) -> None:
    """
    Raises:
        ValueError: a parameter is stepped, and its gradient freed, while backward runs.
    """
    if (name := uses_optimizer_in_backward(parameters)) is not None:
        raise ValueError(
            f"the optimizer of {name} runs in backward and frees its gradient there, so after backward there "
            "is none left to clip (torch.nn.utils clips nothing and returns 0). Clip where the step is "
            "taken: distclip.InBackward(model, make_optimizer, strategy)."
        )
