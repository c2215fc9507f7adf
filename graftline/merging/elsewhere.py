"""Checkpoints in an object store: small files are copied, of weights only what a merge reads.

A folder with the checkpoint's small files and, for each weight file, an empty one of its name
stands for it; the weights' bytes are read from the store, tensor by tensor, and never lie on this
disk.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graftline.errors import GraftlineError
from graftline.merging.companions import WEIGHTS
from graftline.object_urls import PROTOCOLS, holds_credentials, opened, short
from graftline.weight_files import Origin

_OURS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})
"""Faults of this machine's disk."""
_Found = TypeVar("_Found")


def is_elsewhere(source: str) -> bool:
    """Whether a checkpoint's name is a URL."""
    return "://" in source


class RangedObject:
    """A weight file in an object store, read in ranges.

    Args:
        objects: the `fsspec` file system.
        path: its name there.
        url: what people call it.
        listed: what the store says of it: size and ETag.
    """

    def __init__(self, objects: Any, path: str, url: str, listed: Mapping[str, Any]) -> None:
        self._objects, self._path, self._url = objects, path, url
        self._tag, self.size = listed.get("ETag"), int(listed["size"])

    def read(self, start: int, count: int) -> bytes:
        """So many of its bytes; fewer where it ends."""
        count = min(count, self.size - start)
        if count <= 0:
            return b""
        read = partial(self._objects.cat_file, self._path, start=start, end=start + count)
        return bytes(_reached(self._url, read))

    def identity(self) -> str:
        """What the store says of its content.

        Raises:
            GraftlineError: it is another than when the checkpoint was opened.
        """
        found = _reached(self._url, partial(self._objects.info, self._path))
        if (found.get("ETag"), found.get("size")) != (self._tag, self.size):
            raise GraftlineError(f"{self._url}: changed while it was merged; merge again")
        return str(self._tag)


def fetch_checkpoint(url: str, folder: Path, *, whole: bool = False) -> dict[str, Origin]:
    """Makes a folder that stands for a checkpoint in an object store.

    Credentials and the store's address come from the environment, as those of `store: s3://...` do.

    Args:
        url: `s3://bucket/prefix`.
        folder: to make.
        whole: copy its safetensors, too, as is done with an adapter's.

    Returns:
        File name -> where its content is read; of weight files that were not copied.

    Raises:
        GraftlineError: the URL cannot be read, or holds credentials.
    """
    url = url.rstrip("/")
    protocol = url.partition("://")[0]
    if protocol not in PROTOCOLS or holds_credentials(url):
        raise GraftlineError(
            f"{protocol}://...: name a folder, or s3://bucket/prefix with its credentials in the "
            "environment"
        )
    objects, path = opened(url)
    listed = _reached(url, partial(objects.ls, path, detail=True))
    files = {Path(each["name"]).name: each for each in listed if each["type"] == "file"}
    if not files:
        raise GraftlineError(f"{url}: nothing lies there")
    whole = whole or "adapter_config.json" in files
    folder.mkdir(parents=True)
    origins: dict[str, Origin] = {}
    for name, each in sorted(files.items()):
        if name.endswith(WEIGHTS) and not (whole and name.endswith(".safetensors")):
            (folder / name).touch()
            origins[name] = RangedObject(objects, each["name"], f"{url}/{name}", each)
        else:
            _reached(url, partial(objects.get_file, each["name"], str(folder / name)))
    return origins


def _reached(url: str, action: Callable[[], _Found]) -> _Found:
    """Names the store where it cannot be read; its clients' own errors do not."""
    try:
        return action()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OURS:
            raise
        raise GraftlineError(
            f"{url}: cannot be read ({short(error)}). Look at its name, and at the address and the "
            "credentials in the environment."
        ) from error
