"""Encoding and decoding of media, and reading of splits."""

from __future__ import annotations

import io
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from graftline.data import rows
from graftline.data.encoding import encode_animated_png, encode_ply, encode_png, encode_wav
from graftline.data.rows import MODALITIES, SPLITS, MediaError, decode, read_split
from graftline.errors import GraftlineError

RNG = np.random.Generator(np.random.PCG64(5))
PICTURE = RNG.integers(0, 256, (17, 23, 3), dtype=np.uint8)
VIDEO = RNG.integers(0, 256, (4, 150, 160, 3), dtype=np.uint8)
SOUND = RNG.integers(-32768, 32768, 1700, dtype=np.int16)
POINTS = RNG.normal(size=(40, 3)).astype(np.float32)
MEDIA = {
    "image": encode_png(PICTURE),
    "audio": encode_wav(SOUND),
    "video": encode_animated_png(VIDEO, 100),
    "point_cloud": encode_ply(POINTS),
}


def test_round_trip_is_exact() -> None:
    assert np.array_equal(decode(MEDIA["image"], "image"), PICTURE)
    assert np.array_equal(decode(MEDIA["video"], "video"), VIDEO)
    assert np.array_equal(decode(MEDIA["audio"], "audio") * 32768, SOUND)
    assert np.array_equal(decode(MEDIA["point_cloud"], "point_cloud"), POINTS)
    assert [decode(MEDIA[m], m).dtype.name for m in MODALITIES] == [
        "uint8",
        "float32",
        "uint8",
        "float32",
    ]


def test_grey_pictures_become_three_channels() -> None:
    grey = decode(encode_png(PICTURE[..., 0]), "image")
    assert np.array_equal(grey, np.repeat(PICTURE[..., :1], 3, axis=2))
    video = decode(encode_animated_png(VIDEO[..., 0], 100), "video")
    assert np.array_equal(video, np.repeat(VIDEO[..., :1], 3, axis=3))


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(
    "damage",
    [
        lambda media: b"",
        lambda media: b"no media at all",
        lambda media: media[: len(media) // 2],
        lambda media: media[:20],
    ],
)
def test_damaged_media_raise(modality: str, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(MediaError):
        decode(damage(MEDIA[modality]), modality)


def wav(channels: int, width: int, rate: int) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as stream:
        stream.setparams((channels, width, rate, 0, "NONE", ""))
        stream.writeframes(bytes(channels * width * 100))
    return buffer.getvalue()


@pytest.mark.parametrize("layout", [(2, 2, 16000), (1, 1, 16000), (1, 2, 44100)])
def test_other_wav_layouts_are_refused(layout: tuple[int, int, int]) -> None:
    with pytest.raises(MediaError, match="expected 1 channel"):
        decode(wav(*layout), "audio")


def test_absurd_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    with pytest.raises(MediaError, match="more than the"):
        decode(buffer.getvalue(), "image")
    monkeypatch.setattr(rows, "MAX_AUDIO_SECONDS", 0.1)
    with pytest.raises(MediaError, match="longer than"):
        decode(MEDIA["audio"], "audio")
    many = MEDIA["point_cloud"].replace(b"vertex 40", b"vertex 99999999")
    with pytest.raises(MediaError, match="99999999 points"):
        decode(many, "point_cloud")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (b"binary_little_endian", b"ascii", "binary_little_endian"),
        (b"element vertex 40", b"element vertex 40\nelement face 2", "one element"),
        (b"property float z", b"property double z", "float x"),
        (b"vertex 40", b"vertex -4", "not a number"),
        (b"vertex 40", b"vertex 41", "need 492"),
        (b"end_header", b"no_end", "header"),
    ],
)
def test_other_ply_layouts_are_refused(old: bytes, new: bytes, words: str) -> None:
    with pytest.raises(MediaError, match=words):
        decode(MEDIA["point_cloud"].replace(old, new), "point_cloud")


def test_nan_points_are_refused() -> None:
    points = POINTS.copy()
    points[3, 1] = np.nan
    with pytest.raises(MediaError, match="NaN"):
        decode(encode_ply(points), "point_cloud")


def test_unknown_modality_is_named() -> None:
    with pytest.raises(GraftlineError, match="smell"):
        decode(b"x", "smell")


def test_read_split(built: Path) -> None:
    for modality in MODALITIES:
        for split in SPLITS:
            dataset = read_split(built, modality, split)
            assert dataset.column_names == list(rows.COLUMNS)
            assert isinstance(dataset[0]["media"], bytes)
            assert isinstance(dataset[0]["answers"], list)


def test_missing_and_broken_files_are_named(data: Path) -> None:
    path = data / "image" / "test.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(GraftlineError, match=r"image/test\.parquet is not a readable"):
        read_split(data, "image", "test")
    path.unlink()
    with pytest.raises(GraftlineError, match=r"image/test\.parquet is missing"):
        read_split(data, "image", "test")
