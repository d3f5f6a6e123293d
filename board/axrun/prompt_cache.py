"""Keys and values of prompts on disk, so that a restarted server need not compute a system prompt again.

A prompt is stored in blocks of 64 tokens. The name of a block is a hash of the model and of all tokens up to its end:
prompts with a common beginning share its blocks, and a block of another bundle or engine is never found. A file that is
damaged, cut or renamed fails its checksum and is ignored. The least recently used blocks are deleted first.

Keys and values reveal the text they were computed from: only their owner can read the folder and its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import abc
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Full, Queue
from typing import NamedTuple

import numpy as np

from axrun.errors import BadInput
from axrun.kv_pool import NoRoom
from axrun.sequence import Sequence

BLOCK = 64  # tokens
MAGIC = b"axrun kv 1\n"
DIGEST = 32  # bytes of a block's key and of its checksum
SUFFIX, PARTIAL = ".kv", "partial-"
ABANDONED = 600  # seconds after which an unfinished file is of no running server
WAITING = 32  # blocks in memory that are not written yet; more are left out


class Key(NamedTuple):
    """A block of a prompt: the hash of the model and all tokens up to the end of the block."""

    digest: bytes

    @property
    def name(self) -> str:
        return self.digest.hex() + SUFFIX


class PromptCache:
    """Blocks of keys and values in a folder; a thread of its own writes them."""

    def __init__(self, folder: Path, identity: str, limit: int, say: Callable[[str], None]) -> None:
        """`identity`: all that the values depend on besides the tokens. `limit`: bytes of all blocks together.

        `say` receives remarks, also from the thread. Raises BadInput for a folder that cannot be written.
        """
        self._folder, self._limit, self._say = folder, limit, say
        self._root = hashlib.blake2b(identity.encode(), digest_size=DIGEST).digest()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = [(path.stat().st_mtime, path.name, path.stat().st_size) for path in folder.glob(f"*{SUFFIX}")]
            tempfile.TemporaryFile(dir=folder).close()
            _sweep(folder)
        except OSError as error:
            raise BadInput(
                f"the prompt cache {folder} cannot be written: {error.strerror}\nName another --prompt-cache."
            ) from None
        # bytes by name, least recently used first; 0: not written yet
        self._sizes = {name: size for _, name, size in sorted(found) if size}
        self._lock = threading.Lock()
        self._queue: Queue[tuple[Key, bytes] | None] = Queue(WAITING)
        self._thread = threading.Thread(target=self._write_all, name="prompt cache", daemon=True)
        self._thread.start()

    def restore(self, sequence: Sequence, ids: abc.Sequence[int]) -> int:
        """Reads the blocks that `ids` begin with behind those that the sequence holds; returns their tokens.

        The last token of `ids` is never read: its logits have to be computed.
        """
        begin = sequence.common(ids) // BLOCK
        restored = 0
        for place, key in enumerate(self._keys(ids[:-1])):
            if place < begin:
                continue
            nbytes = sequence.model.decoder.cache.nbytes_of(BLOCK)
            payload = self._read(key, nbytes)
            if payload is None:
                break
            try:
                sequence.restore(ids[place * BLOCK : (place + 1) * BLOCK], place * BLOCK, payload)
            except NoRoom:
                break
            restored += BLOCK
        return restored

    def save(self, sequence: Sequence, count: int) -> None:
        """Has the whole blocks written that the first `count` tokens of the sequence fill and that are not stored."""
        for place, key in enumerate(self._keys(sequence.ids[:count])):
            with self._lock:
                if key.name in self._sizes:
                    continue
                self._sizes[key.name] = 0
            try:
                self._queue.put_nowait((key, sequence.model.decoder.cache.read(place * BLOCK, BLOCK)))
            except Full:
                self._forget(key)
                return

    def close(self) -> None:
        """Waits until all blocks are written."""
        self._queue.put(None)
        self._thread.join()

    def _keys(self, ids: abc.Sequence[int]) -> Iterator[Key]:
        digest = self._root
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            tokens = np.array(ids[start : start + BLOCK], "<u4").tobytes()
            digest = hashlib.blake2b(tokens, key=digest, digest_size=DIGEST).digest()
            yield Key(digest)

    def _read(self, key: Key, nbytes: int) -> bytes | None:
        """The payload of a block, or None if it is not stored or not whole."""
        path = self._folder / key.name
        with self._lock:
            if not self._sizes.get(key.name):  # not stored, or not written yet
                return None
        try:
            with path.open("rb") as file:
                head = file.read(len(MAGIC) + DIGEST)
                payload = file.read(nbytes + 1)
            os.utime(path)
        except OSError as error:
            self._say(f"note: prompt cache: {path.name[:12]}... cannot be read: {error.strerror}")
            self._forget(key)
            return None
        if len(payload) != nbytes or head != MAGIC + _checksum(key, payload):
            self._say(f"note: prompt cache: {path.name[:12]}... is damaged and is written again")
            self._forget(key)
            return None
        with self._lock:
            self._sizes[key.name] = self._sizes.pop(key.name, nbytes)  # now the most recently used
        return payload

    def _forget(self, key: Key) -> None:
        with self._lock:
            self._sizes.pop(key.name, None)

    def _write_all(self) -> None:
        reported = None  # the last failure, reported once: a full disk would fill the log with it
        while (task := self._queue.get()) is not None:
            failure, doing = None, "written"
            try:
                self._write(*task)
                doing = "deleted"
                self._make_room()
            except OSError as error:
                failure = doing, error.strerror
            if failure is not None and failure != reported:
                self._say(f"warning: prompt cache: blocks cannot be {doing}: {failure[1]}")
            elif failure is None and reported is not None:
                self._say(f"note: prompt cache: blocks can be {reported[0]} again")
            reported = failure

    def _write(self, key: Key, payload: bytes) -> None:
        name = None
        try:
            handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=self._folder)  # readable by its owner only
            with os.fdopen(handle, "wb") as file:
                file.write(MAGIC + _checksum(key, payload))
                file.write(payload)
            os.replace(name, self._folder / key.name)
        except BaseException:
            self._forget(key)
            with contextlib.suppress(OSError):
                if name is not None:
                    os.unlink(name)
            raise
        with self._lock:
            self._sizes[key.name] = len(MAGIC) + DIGEST + len(payload)

    def _make_room(self) -> None:
        with self._lock:
            oldest = [name for name, size in self._sizes.items() if size]
            total = sum(self._sizes.values())
        for name in oldest:
            if total <= self._limit:
                return
            with contextlib.suppress(FileNotFoundError):
                (self._folder / name).unlink()
            with self._lock:
                total -= self._sizes.pop(name, 0)


def _sweep(folder: Path) -> None:
    """Deletes the unfinished files of servers that were killed."""
    for path in folder.glob(f"{PARTIAL}*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _checksum(key: Key, payload: bytes) -> bytes:
    return hashlib.blake2b(payload, key=key.digest, digest_size=DIGEST).digest()
