"""One clipping step, part by part, and what goes on from step to step.

In come the gradients that backward has left, with optimizers and a GradScaler where there are any; out go
changed gradients, steps taken or skipped, and a ClipReport. ``Clipper`` and the integrations are built on
it; it imports neither them nor ``training``.
"""
