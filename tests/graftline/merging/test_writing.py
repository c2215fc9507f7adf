"""Merged files: the same bytes past the page cache and through it, and no error lost."""

import errno
import fcntl
import hashlib
import os

import numpy as np
import pytest

from graftline.merging import writing
from graftline.merging.writing import Writing

PIECE = writing._PIECE
SIZES = ([], [1], [4096], [PIECE], [PIECE - 1, 2], [3, PIECE, 5000, 2 * PIECE + 7])


def refusing(place):
    """`os.open` and `os.write` of a file system without direct writing: one of them says no."""
    really_open, really_write = os.open, os.write

    def opened(path, flags, *more):
        descriptor = really_open(path, flags, *more)
        if place == "open" and flags & os.O_DIRECT:
            os.close(descriptor)  # the file is there all the same
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return descriptor

    def written(descriptor, content):
        if place == "write" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return really_write(descriptor, content)

    return opened, written


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct writing")
@pytest.mark.parametrize("place", ["nowhere", "open", "write"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_file_holds_what_was_written_wherever_direct_writing_fails(
    tmp_path, monkeypatch, sizes, place
):
    opened, written = refusing(place)
    monkeypatch.setattr(writing.os, "open", opened)
    monkeypatch.setattr(writing.os, "write", written)
    generator = np.random.default_rng(0)
    pieces = [generator.integers(0, 256, size, np.uint8) for size in sizes]
    with Writing(tmp_path) as files:
        files.write("file", b"head")
        for piece in pieces:
            files.write("file", piece)
    expected = b"head" + b"".join(piece.tobytes() for piece in pieces)
    assert (tmp_path / "file").read_bytes() == expected
    assert files.files() == {
        "file": {"sha256": hashlib.sha256(expected).hexdigest(), "size": len(expected)}
    }


@pytest.mark.parametrize("size", [10, 2 * PIECE])
def test_an_error_of_the_disk_comes_out(tmp_path, monkeypatch, size):
    def full(descriptor, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "write", full)
    with pytest.raises(OSError, match="No space left"), Writing(tmp_path) as files:
        files.write("file", np.zeros(size, np.uint8))
