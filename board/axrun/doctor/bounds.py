"""Bounds on time and memory for what a checkpoint brings: its chat template is a program of its own."""

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
except ImportError:  # no POSIX
    resource = None  # type: ignore[assignment]

SECONDS = 60.0  # of processor time
MEMORY = 1 << 30  # bytes beyond what the process has


class _TooLong(BaseException):
    """Passes by what catches Exception."""


@contextlib.contextmanager
def bounded(what: str) -> Iterator[None]:
    """Raises BadInput where the block takes more than SECONDS; more than MEMORY is a MemoryError inside it.

    Only the main thread can be stopped; elsewhere the block runs as it is.
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
        raise BadInput(f"{what} takes more than {SECONDS:g} s of processor time\nMend it, or remove it.") from None
    except MemoryError:
        raise BadInput(f"{what} takes more than {MEMORY >> 20} MiB\nMend it, or remove it.") from None
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
    """Bytes of address space that the process has; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


__all__ = ["bounded"]
