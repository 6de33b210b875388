"""``python -m distclip`` is ``distclip``."""

import sys

from distclip.cli import main

if __name__ == "__main__":
    sys.exit(main())
