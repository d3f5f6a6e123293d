"""Time and memory limits for untrusted code of a checkpoint: its chat template is a program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from axrun.errors import BadInput

try:
    import resource
except ImportError:  # not a POSIX system
    resource = None  # type: ignore[assignment]

SECONDS = 60.0  # of CPU time
MEMORY = 1 << 30  # bytes on top of the current address space


class _TooLong(BaseException):
    """Not an Exception, so that the limited code cannot catch it by accident."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Limits a block to SECONDS and MEMORY; raises BadInput if it exceeds them.

    Only works in the main thread; elsewhere the block runs without limits.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with _less_memory():
            yield
    except _TooLong:
        raise BadInput(f"{what} takes more than {SECONDS:g} s of CPU time\nFix it, or remove it.") from None
    except MemoryError:
        raise BadInput(f"{what} takes more than {MEMORY >> 20} MiB\nFix it, or remove it.") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def _less_memory() -> Iterator[None]:
    limits = None if resource is None else resource.getrlimit(resource.RLIMIT_AS)
    used = _used()
    if limits is None or not used:
        yield
        return
    most = used + MEMORY
    known = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([most, *known]), limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _used() -> int:
    """Size of the address space of the process in bytes; 0 if unknown."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


__all__ = ["bounded"]
