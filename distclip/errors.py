"""The exceptions of distclip.

::

    Exception
    └── DistclipError
        ├── OwnershipError   (also a RuntimeError)  which rank holds what could not be established
        ├── SettingsError    (also a RuntimeError)  ranks are configured differently
        └── NonFiniteError   (also a RuntimeError)  the total gradient norm is NaN or infinite

Wrong arguments are plain :class:`ValueError` / :class:`TypeError`.
"""

from __future__ import annotations


class DistclipError(Exception):
    """Base class of every exception that distclip defines."""


class OwnershipError(DistclipError, RuntimeError):
    """It is not known, or not consistent, which rank holds which part of a parameter.

    Raised on every rank in scope, from values that all ranks have reduced together, so that no rank
    waits for another that has already failed.
    """


class SettingsError(DistclipError, RuntimeError):
    """Ranks that clip together have different strategies, arguments or states.

    Raised on every rank in scope, with both sides quoted, before anything is touched.
    """


class NonFiniteError(DistclipError, RuntimeError):
    """The total norm of the gradients is NaN or infinite and the caller asked for an error.

    Decided on the reduced norm: every rank in scope raises it, before any gradient is touched.
    """
