"""Runs the command line on a wrong file in bounded memory and time and judges how it ended."""

import contextlib
import io
import re
import resource
import signal

from hypothesis import settings

from pydit.cli import main

HEADROOM = 1 << 30  # of address space beyond what the process has: libraries' own, never a size that a file announces
SECONDS = 60


def seeds(most=1000):
    """As many as the hypothesis profile says: 100, in the profile ``nightly`` 1,000."""
    return range(min(settings().max_examples, most))


@contextlib.contextmanager
def bounded(headroom=HEADROOM):
    """An allocation far beyond the files of a test raises, and so does a loop that does not end."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)

    def late(*_):
        raise RuntimeError(f"no end after {SECONDS} s")

    handler = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (size + headroom, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def command(*argv):
    """(exit code, standard output, standard error) of a command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with bounded(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(a) for a in argv])
    return code, out.getvalue(), err.getvalue()


def complaint(code, err):
    """None where a command ended as it may: well, or with one sentence and exit code 2; else what is wrong."""
    lines = [line for line in err.splitlines() if "it/s" not in line and not line.startswith(("encode:", "collect:"))]
    if "Traceback" in err:
        return f"a traceback: {err[-300:]}"
    if code == 0:
        return None
    last = lines[-1] if lines else ""
    if code != 2 or not re.match(r"pydit: error: .*expected .*got ", last):
        return f"exit code {code}: {last[:300]}"
    return None if sum(line.startswith("pydit: error") for line in lines) == 1 else f"more than a line: {err[:300]}"
