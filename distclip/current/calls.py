"""How often a list has been clipped or measured."""

from __future__ import annotations


class Calls:
    """Counts them. What is known of the same tensors for several norms shares one, so that copies are
    compared in the same calls whichever norm each rank wants."""

    def __init__(self) -> None:
        self.number = 0

    def another(self) -> bool:
        """Whether it is the 1st, 2nd, 4th, 8th, …"""
        self.number += 1
        return self.number & (self.number - 1) == 0
