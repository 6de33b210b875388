"""The news that end a step: what ranks have told each other in its message."""

from __future__ import annotations


class OutdatedPlan(Exception):
    """Some ranks have said, in a message of the step, that their parameters have changed.

    Attributes:
        everyone: all have, so that they can plan anew together.
    """

    def __init__(self, *, everyone: bool) -> None:
        super().__init__("the plan is out of date")
        self.everyone = everyone


class AskedOtherwise(Exception):
    """Ranks have said, in the message of the step, that they were asked for different things."""
