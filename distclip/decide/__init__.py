"""What a strategy is told, and what it says.

In come numbers that have been reduced over all ranks, and the names and shapes of parameters; out go
``Norms``, a ``Decision`` and a ``ClipReport``, all on the device. Knows no process group and no gradient;
imports ``kernels`` alone.
"""
