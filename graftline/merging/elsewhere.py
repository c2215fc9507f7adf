"""Checkpoints in an object store: small files are copied, of weights only what a merge reads.

A folder with the checkpoint's small files and, for each weight file, an empty one of its name
stands for it; the weights' bytes are read from the store, tensor by tensor, and never lie on this
disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from graftline.errors import GraftlineError
from graftline.merging.companions import WEIGHTS
from graftline.weight_files import Origin

_PROTOCOLS = ("s3", "s3a")
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
        size: its bytes.
    """

    def __init__(self, objects: Any, path: str, url: str, size: int) -> None:
        self._objects, self._path, self._url, self.size = objects, path, url, size

    def read(self, start: int, count: int) -> bytes:
        """So many of its bytes; fewer where it ends."""
        count = min(count, self.size - start)
        if count <= 0:
            return b""
        read = partial(self._objects.cat_file, self._path, start=start, end=start + count)
        return bytes(_reached(self._url, read))

    def identity(self) -> str:
        """Digest of what the store says of its content now."""
        found = _reached(self._url, partial(self._objects.info, self._path))
        told = repr([found.get("size"), found.get("ETag"), str(found.get("LastModified"))])
        return hashlib.sha256(told.encode()).hexdigest()[:16]


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
    protocol, _, place = url.partition("://")
    if protocol not in _PROTOCOLS or "@" in place.partition("/")[0]:
        raise GraftlineError(
            f"{protocol}://...: name a folder, or s3://bucket/prefix with its credentials in the "
            "environment"
        )
    try:
        import fsspec

        objects, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise GraftlineError(f"{url}: {error}. pip install 'graftline[s3]'") from error
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
            origins[name] = RangedObject(objects, each["name"], f"{url}/{name}", each["size"])
        else:
            _reached(url, partial(objects.get_file, each["name"], str(folder / name)))
    return origins


def _reached(url: str, action: Callable[[], _Found]) -> _Found:
    """Names the store where it cannot be read; its clients' own errors do not."""
    try:
        return action()
    except Exception as error:
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise GraftlineError(
            f"{url}: cannot be read ({text}). Look at its name, and at the address and the "
            "credentials in the environment."
        ) from error
