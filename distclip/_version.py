"""Here and not in the package's metadata, so that a source tree that was never installed knows it too."""

__version__ = "0.1.0"
