"""Where a run writes its figures: after every case, and never over those of another run before it has them all."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydit.files import require_file, write_json

JSON_HELP = ("write all figures to this file, after every {}; until the end to FILE.partial where the file has those "
             "of an earlier run")


class Output:
    """The file of ``--json``. Where it holds something already, what this run has so far is in FILE.partial, which
    takes the file's place in one step when the run is over; a run that ends before leaves both."""

    def __init__(self, path: Path | None, *, kind: str, resume: bool = False):
        self.path, self.partial = path, None if path is None else path.with_name(f"{path.name}.partial")
        require_file(self.partial, what="json", kind=kind)
        taken = path is not None and path.is_file() and path.stat().st_size > 0
        #: What ``resume`` goes on with, or None.
        self.before = None
        if resume:
            self.before = self.partial if self.partial.exists() else path if path.exists() else None
        self._place = self.partial if (taken and not resume) or self.before == self.partial else path

    def write(self, data: dict[str, Any]) -> None:
        """What there is so far."""
        if self._place is not None:
            write_json(self._place, data)

    def finish(self, data: dict[str, Any], *, whole: bool) -> None:
        """The last write. ``whole``: nothing that was asked for is missing."""
        if self.path is None:
            return
        if whole or self._place == self.path:
            write_json(self.path, data)
            self.partial.unlink(missing_ok=True)
        else:
            write_json(self.partial, data)
            print(f"{self.path} is as it was: this run ended before its last case, and what it has is in "
                  f"{self.partial}", file=sys.stderr)
