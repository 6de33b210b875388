"""Step by step beside the public implementations. They come with ``pip install -e '.[parity]'``."""

import os
import tempfile

os.environ["KERAS_BACKEND"] = "torch"
os.environ["KERAS_HOME"] = tempfile.mkdtemp(prefix="keras-")  # it writes a configuration file where it lives
