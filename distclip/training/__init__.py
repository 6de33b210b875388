"""The training step around clipping, for those who do not leave it all to ``Clipper.step``.

In come a model, its optimizers or its GradScaler; out go steps taken in backward, and unscaled gradients.
Built on ``clipper`` and ``hooks``; the clipper does not import it.
"""
