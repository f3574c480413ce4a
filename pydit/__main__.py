"""``python -m pydit`` is the command ``pydit``."""

import sys

from pydit.cli import main

sys.exit(main())
