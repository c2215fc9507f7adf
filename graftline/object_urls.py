"""URLs of object stores: which are taken, how they are opened, and how their trouble is told."""

from __future__ import annotations

import re
from typing import Any

from graftline.errors import GraftlineError

# Their writes appear whole or not at all, which a plain folder's do not; others were not tried.
PROTOCOLS = ("s3", "s3a")


def without_credentials(text: str) -> str:
    """A text whose URLs name no user and no password, to be shown."""
    return re.sub(r"(?<=://)[^/\s]*@", "", text)


def holds_credentials(url: str) -> bool:
    """Whether a URL says who asks: `s3://id:secret@bucket/prefix`."""
    place = url.partition("://")[2]
    return "@" in place.partition("/")[0] or re.search(":.*@", place) is not None


def opened(url: str) -> tuple[Any, str]:
    """The `fsspec` file system of a URL, which remembers no listings, and the URL's path there.

    Other machines write, too, so what was listed before is not trusted.

    Raises:
        GraftlineError: what the protocol needs is not installed.
    """
    import fsspec

    try:
        objects, path = fsspec.core.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise GraftlineError(
            f"{url}: {error}. For s3:// install the extra: pip install 'graftline[s3]'"
        ) from error
    return objects, str(path)


def short(error: BaseException) -> str:
    """The first line of what a client's error says."""
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
