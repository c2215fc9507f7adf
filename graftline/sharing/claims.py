"""Who computes a step, said in an object store, so that two machines do not do the same work.

A claim saves work and guards nothing: artifacts are published whole, whoever computes them. So
where claims cannot be read or written, machines compute.

A machine writes `<url>/.claims/<kind>-<fingerprint>` where there is none, and again every few
seconds while it computes. Others wait until the step is published. A claim that nobody renews any
more, or whose process is gone from their own host, is taken over.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

from graftline import durable
from graftline.sharing.checkpoints import repeated

_LEASE_SECONDS = 45.0
"""How long a claim is not renewed before it is taken over."""
_RENEWAL_SECONDS = 5.0
_LOOK_SECONDS = 2.0

_HERE = {"host": durable.host_token(), "processes": durable.process_namespace()}
"""Where this process's id means this process."""
_log = logging.getLogger("graftline.store")


class SharedClaim:
    """A machine's claim on one step.

    Args:
        objects: the `fsspec` file system.
        place: URL of the claim.
    """

    def __init__(self, objects: Any, place: str) -> None:
        self._objects, self._place = objects, place
        self._identity = {**_HERE, "pid": os.getpid(), "key": uuid4().hex}
        self._renewals = 0

    @contextmanager
    def held(self, is_done: Callable[[], bool]) -> Iterator[bool]:
        """Waits while another machine has the claim.

        Args:
            is_done: whether the step is published.

        Yields:
            Whether this machine is to compute: False if another one has published the step.
        """
        if not self._won(is_done):
            yield False
            return
        try:
            with repeated(lambda: self._guarded(self._write), _RENEWAL_SECONDS, "claim"):
                yield True
        finally:
            self._guarded(self._remove)

    def _won(self, is_done: Callable[[], bool]) -> bool:
        """Returns when this machine has the claim, or the step is published (False)."""
        seen, since = b"", time.monotonic()
        while True:
            try:
                self._write(mode="create")
                if not is_done():
                    return True
                self._guarded(self._remove)  # its holder finished between two looks
                return False
            except FileExistsError:
                pass
            except Exception as error:  # `fsspec`'s file systems pass their clients' errors on
                self._complain(error)
                return True
            if is_done():
                return False
            found = self._read()
            if found != seen:
                if not seen:
                    _log.info("%s: another machine is at it; waiting", self._place)
                seen, since = found, time.monotonic()
            elif time.monotonic() - since >= _LEASE_SECONDS or _is_dead(found):
                _log.info("%s: its holder is gone; taken over", self._place)
                self._guarded(self._write)
                return True
            time.sleep(_LOOK_SECONDS)

    def _write(self, mode: str = "overwrite") -> None:
        self._renewals += 1
        content = {**self._identity, "renewals": self._renewals}
        self._objects.pipe_file(self._place, json.dumps(content).encode(), mode=mode)

    def _remove(self) -> None:
        self._objects.rm_file(self._place)

    def _read(self) -> bytes:
        """The claim; what changes at each look where it cannot be read, as one that is renewed."""
        try:
            return bytes(self._objects.cat_file(self._place))
        except Exception:
            return uuid4().bytes

    def _guarded(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._complain(error)

    def _complain(self, error: Exception) -> None:
        _log.warning("%s: the claim is not kept (%s)", self._place, error)


def _is_dead(claim: bytes) -> bool:
    """Whether a claim's holder was a process of this host that does not run any more."""
    try:
        holder = json.loads(claim)
        here = all(holder[name] == value for name, value in _HERE.items())
        return here and not durable.process_runs(holder["pid"])
    except (ValueError, TypeError, KeyError):
        return False
