"""A small untrained demo pipeline for tests that need a complete directory, built once per test process."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path


@functools.cache
def untrained(num_layers: int = 6) -> Path:
    """A pipeline directory with that many blocks; read only."""
    from pydit.demo.teacher import build_untrained

    folder = Path(tempfile.mkdtemp(prefix="pydit-untrained-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return build_untrained(folder / "teacher", num_layers=num_layers)
