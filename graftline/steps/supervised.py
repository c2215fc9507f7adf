"""Child processes that end with their parent, however the parent ends.

The parent holds the writing end of the child's standard input. When the parent dies, even by
SIGKILL, the kernel closes it, and the child, which waits for that, stops.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

import graftline

_GRACE_SECONDS = 3.0


def start_child(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, quiet: bool = True
) -> subprocess.Popen[str]:
    """Starts `python <arguments>` in its own session with pipes to its input and output.

    Args:
        arguments: what follows the interpreter.
        environment: variables on top of this process's.
        quiet: throw away what the child writes to standard error.
    """
    paths = [str(Path(graftline.__file__).resolve().parents[1])]  # where it was imported from
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})},
        start_new_session=True,
    )


def stop_child(child: subprocess.Popen[str], grace_seconds: float = _GRACE_SECONDS) -> None:
    """Closes the child's input, waits for its end, and kills it when it takes too long."""
    _close(child.stdin)
    try:
        child.wait(grace_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    _close(child.stdout)  # not before: whoever reads it holds it until the child ends


def _close(stream: IO[str] | None) -> None:
    if stream is not None and not stream.closed:
        with suppress(OSError):
            stream.close()


def when_parent_ends(stop: Callable[[], None], grace_seconds: float = _GRACE_SECONDS) -> None:
    """In a child: calls `stop` when standard input ends, and exits by force soon after."""

    def watch() -> None:
        while sys.stdin.buffer.read(4096):
            pass
        stop()
        time.sleep(grace_seconds)
        os._exit(0)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
