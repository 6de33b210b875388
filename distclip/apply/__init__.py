"""What is decided is done: to the gradients, the loss scale, the optimizer, the window of micro-batches.

In come a ``Decision`` and norms; out goes an ``Outcome``, applied on every rank alike. Talks to no other
rank, waits for no device but where a step must be skipped by the host; never imports ``current``,
``planning`` or a clipper.
"""
