"""Which kind of store a recipe's `store` names, and where this machine keeps its own part of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from graftline.store import Store


def is_shared(location: str | Path) -> bool:
    """Whether a store's name is a URL: several machines share it."""
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
