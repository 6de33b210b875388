"""The training step around clipping, for those who do not leave it all to ``Clipper.step``."""
