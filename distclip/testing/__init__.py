"""Check that a strategy of your own keeps the laws that make it right on every rank.

In comes what makes a strategy; out goes an error that says which law it breaks, and where. Imports
``decide`` and ``strategies`` alone, so that it runs without any ranks.

>>> from distclip.testing import check_strategy
>>> check_strategy(lambda: distclip.ZClip(warmup=25))
"""

from distclip.testing._check import LAWS, LawBroken, check_strategy

__all__ = ["LAWS", "LawBroken", "check_strategy"]
