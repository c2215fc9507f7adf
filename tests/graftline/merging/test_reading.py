"""Checkpoints: the same bytes past the page cache and through it, wherever a tensor begins."""

import errno
import mmap
import os

import numpy as np
import pytest

from graftline.merging import reading
from graftline.merging.reading import BLOCK, ReadFile, block_of, room_for

PAGE = mmap.PAGESIZE
SIZE = 5 * PAGE + 123
PARTS = [(0, 1), (8, PAGE), (PAGE, PAGE), (16, 3 * PAGE - 8), (3, 2 * PAGE), (SIZE - 9, 9)]


@pytest.fixture
def content(tmp_path):
    found = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8)
    (tmp_path / "file").write_bytes(found.tobytes())
    return found


def refusing(place):
    """`os.open` and `os.preadv` of a file system without direct reading: one of them says no."""
    really_open, really_read, direct = os.open, os.preadv, set()

    def opened(path, flags, *more):
        if flags & os.O_DIRECT and place == "open":
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        descriptor = really_open(path, flags, *more)
        direct.discard(descriptor)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def read(descriptor, buffers, start, *flags):
        if descriptor in direct:
            if place == "read":
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            if place == "half":  # as after a signal
                buffers = [buffers[0][: max(PAGE, len(buffers[0]) // 2 // PAGE * PAGE)]]
        return really_read(descriptor, buffers, start, *flags)

    return opened, read, direct


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no direct reading")
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("place", ["nowhere", "open", "read", "half"])
def test_bytes_are_the_same_wherever_direct_reading_fails(
    tmp_path, monkeypatch, content, place, cached
):
    opened, read, direct = refusing(place)
    monkeypatch.setattr(reading.os, "open", opened)
    monkeypatch.setattr(reading.os, "preadv", read)
    monkeypatch.setattr(reading, "_lies_in_the_cache", lambda descriptor: cached)
    file = ReadFile(tmp_path / "file")
    assert bool(direct) == (place != "open" and not cached)
    try:
        for start, size in PARTS:
            room = np.frombuffer(mmap.mmap(-1, room_for(size)), np.uint8)
            assert np.array_equal(file.read(start, size, room), content[start : start + size])
        with pytest.raises(OSError, match="file: was cut off"):
            file.read(SIZE - 16, 17, np.frombuffer(mmap.mmap(-1, room_for(17)), np.uint8))
    finally:
        file.close()


def test_a_file_lies_in_the_cache_when_it_was_read_and_not_when_it_was_dropped(tmp_path):
    content = bytes(1 << 20)
    with open(tmp_path / "file", "wb") as file:
        file.write(content)
        os.fsync(file.fileno())
    descriptor = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        assert reading._lies_in_the_cache(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        if reading._lies_in_the_cache(descriptor):
            pytest.skip("this file system keeps what it is told to drop")
        assert not reading._lies_in_the_cache(descriptor), "looking is not reading"
        assert os.pread(descriptor, len(content), 0) == content
        assert reading._lies_in_the_cache(descriptor)
    finally:
        os.close(descriptor)


def test_a_file_that_cannot_be_mapped_is_read_as_usual(tmp_path, monkeypatch, content):
    def mapped(*_given, **_named):
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    room = np.frombuffer(mmap.mmap(-1, room_for(SIZE)), np.uint8)
    monkeypatch.setattr(reading.mmap, "mmap", mapped)
    file = ReadFile(tmp_path / "file")
    assert np.array_equal(file.read(0, SIZE, room), content)
    file.close()


def test_blocks_of_all_models_hold_the_same_however_many_there_are():
    assert block_of(1) == block_of(3) == BLOCK
    for models in range(1, 200):
        assert BLOCK <= block_of(models) * max(models, 3) <= 3 * BLOCK
        assert block_of(models) % 8 == 0
