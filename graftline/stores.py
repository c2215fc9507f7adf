"""Which kind of store a recipe's `store` names, and where this machine keeps its own part of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from graftline.errors import GraftlineError
from graftline.store import Store

_ONE_SLASH = re.compile(r"[a-z0-9]+:/(?!/)")


def is_shared(location: str | Path) -> bool:
    """Whether a store's name is a URL: several machines share it.

    Raises:
        GraftlineError: it is a URL but for a slash, which would be a folder here.
    """
    one_slash = _ONE_SLASH.match(str(location))
    if one_slash:  # what follows may hold credentials
        raise GraftlineError(
            f"store: {one_slash[0]}... lacks a slash; write {one_slash[0]}/bucket/prefix"
        )
    return "://" in str(location)


def open_store(location: str | Path, verify: Literal["quick", "full"] = "full") -> Store:
    """The store that a recipe names: a local folder, or an object store with copies here.

    Args:
        location: a folder, or a URL such as `s3://bucket/prefix`.
        verify: as of `Store`.

    Raises:
        GraftlineError: the URL cannot be a store.
    """
    if not is_shared(location):
        return Store(location, verify)
    from graftline.sharing.store import SharedStore

    return SharedStore(str(location), verify)


def machine_folder(location: str | Path) -> Path:
    """Where this machine keeps what concerns it alone: locks, records of runs, checkpoints.

    That is the store's own folder, or of a shared store the folder of its copies.
    """
    return open_store(location).root
