"""A small untrained demo pipeline for tests that need a complete directory, built once per test process."""

import functools
import tempfile
from pathlib import Path


@functools.cache
def untrained(num_layers: int = 6) -> Path:
    """A pipeline directory with that many blocks; read only."""
    from pydit.demo.teacher import build_untrained

    return build_untrained(Path(tempfile.mkdtemp(prefix="pydit-untrained-")) / "teacher", num_layers=num_layers)
