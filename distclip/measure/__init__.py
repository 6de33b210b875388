"""Each step: gradients as they are, merged, to sums of powers, to ONE all-reduce, to ``Norms``.

In come a ``Plan`` and parameters with gradients; out go norms, the same on every rank. Changes no gradient
but those that wait for a sum; never decides, and imports nothing of ``apply`` or above.
"""
