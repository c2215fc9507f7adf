"""Media files of unknown origin: what is read, and what is refused before it does harm."""

from __future__ import annotations

import io
import os
import struct
import wave
import zlib

import numpy as np
import pytest
from PIL import Image

from graftline.asking import media
from graftline.asking.media import read_medium
from graftline.data import files
from graftline.data.encoding import encode_animated_png, encode_ply, encode_png, encode_wav
from graftline.data.rows import MediaError, decode
from graftline.data.sources.fitting import fit_medium
from graftline.model.efficientnet import ImageEncoder
from graftline.model.whisper import WhisperAudioEncoder
from graftline.settings.sources import SourceSettings

WHISPER = WhisperAudioEncoder.name


def _wav(samples, channels=1, width=2, rate=16_000):
    stream = io.BytesIO()
    with wave.open(stream, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(width)
        out.setframerate(rate)
        out.writeframes(samples)
    return stream.getvalue()


def _tone(rate, seconds=1.0, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


def _bomb(side):
    """A PNG of a few hundred bytes that says it is `side` pixels wide and high."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


GENERATOR = np.random.Generator(np.random.PCG64(0))
PICTURE = GENERATOR.integers(0, 256, (16, 16, 3), dtype=np.uint8)
FRAMES = GENERATOR.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
CLOUD = GENERATOR.standard_normal((64, 3)).astype(np.float32)
CLIP = (32767 * _tone(16_000)).astype(np.int16)
ROWS = {
    "image": encode_png(PICTURE),
    "audio": encode_wav(CLIP),
    "video": encode_animated_png(FRAMES, 100),
    "point_cloud": encode_ply(CLOUD),
}


@pytest.mark.parametrize("modality", ROWS)
def test_files_as_data_rows_hold_them_give_the_same_numbers(modality, tmp_path):
    path = tmp_path / "medium"
    path.write_bytes(ROWS[modality])
    found = read_medium(path, modality, WHISPER)
    assert np.array_equal(found.values, decode(ROWS[modality], modality))
    assert found.values.dtype == decode(ROWS[modality], modality).dtype
    assert found.notes == ()


@pytest.mark.parametrize(
    ("modality", "content", "words"),
    [
        ("image", b"", ["empty", "0 bytes"]),
        ("image", ROWS["audio"], ["not a readable picture", "PNG or JPEG"]),
        ("image", ROWS["image"][:200], ["damaged"]),
        ("image", _bomb(50_000), ["pixels"]),
        ("image", _bomb(9_000), ["81000000 pixels"]),
        ("image", encode_png(PICTURE[:4]), ["at least"]),
        ("audio", ROWS["image"], ["not a readable WAV", "ffmpeg"]),
        ("audio", ROWS["audio"][:-100], ["cut off"]),
        ("audio", _wav(b""), ["0 s"]),
        ("audio", _wav(bytes(200), rate=100), ["100 samples a second"]),
        ("video", b"\0\0\0\x18ftypmp42" + bytes(100), ["not a readable picture", "ffmpeg"]),
        ("video", ROWS["image"], ["at least (2, 8, 8, 3)"]),
        ("video", ROWS["video"][:-300], ["damaged"]),
        ("point_cloud", ROWS["point_cloud"][:-1], ["64 points need", "PLY"]),
        ("point_cloud", b"ply\nformat ascii 1.0\nend_header\n", ["binary_little_endian"]),
    ],
)  # fmt: skip
def test_bad_files_are_named_with_what_to_do(modality, content, words, tmp_path):
    path = tmp_path / "medium.bin"
    path.write_bytes(content)
    with pytest.raises(MediaError) as error:
        read_medium(path, modality, WHISPER)
    for word in [str(path), *words]:
        assert word in str(error.value)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    for path, word in (
        (tmp_path / "absent.png", "no such file"),
        (tmp_path, "no regular file"),
        (tmp_path / "pipe", "no regular file"),
        (tmp_path / "a\0b", "cannot be read"),
        (tmp_path / ("x" * 300), "cannot be read"),
    ):
        with pytest.raises(MediaError, match=word):
            read_medium(path, "image", ImageEncoder.name)


def test_limits_hold_before_anything_is_decoded(tmp_path, monkeypatch):
    long = tmp_path / "three-hours.wav"
    header = ROWS["audio"][:40] + struct.pack("<I", 2 * 3 * 3600 * 16_000)
    with long.open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + 2 * 3 * 3600 * 16_000)
    with pytest.raises(MediaError, match="10800 s; at most 1800 s"):
        read_medium(long, "audio", WHISPER)
    monkeypatch.setattr(files, "MAX_FILE_BYTES", 100)
    (tmp_path / "a.png").write_bytes(ROWS["image"])
    with pytest.raises(MediaError, match="at most 100 are read"):
        read_medium(tmp_path / "a.png", "image", ImageEncoder.name)
    monkeypatch.undo()
    monkeypatch.setattr(media, "MAX_POINTS", 63)
    (tmp_path / "b.ply").write_bytes(ROWS["point_cloud"])
    with pytest.raises(MediaError, match="64 points"):
        read_medium(tmp_path / "b.ply", "point_cloud", "basis-point-set")


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_other_rates_widths_and_channels_sound_the_same(rate, width, tmp_path):
    values = _tone(rate)
    largest = 2 ** (8 * width - 1)
    whole = np.round(values * (largest - 1)).astype(np.int64) + (128 if width == 1 else 0)
    octets = whole.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width]
    both = np.repeat(octets, 2, axis=0)  # the same on the left and on the right
    path = tmp_path / "tone.wav"
    path.write_bytes(_wav(both.tobytes(), channels=2, width=width, rate=rate))
    found = read_medium(path, "audio", WHISPER)
    assert found.values.shape == (16_000,)
    assert found.values.dtype == np.float32
    inner = slice(500, -500)  # a filter has no neighbours at the ends
    assert np.abs(found.values - _tone(16_000))[inner].max() < (0.02 if width == 1 else 0.01)
    assert f"2 channel(s), {8 * width} bits, {rate} Hz" in found.notes[0]


def test_sounds_are_cut_or_filled_for_an_encoder_of_clips(tmp_path):
    path = tmp_path / "long.wav"
    path.write_bytes(encode_wav(np.tile(CLIP, 3)))
    found = read_medium(path, "audio", WHISPER)
    assert np.array_equal(found.values, decode(ROWS["audio"], "audio"))
    assert "only the first 1 s of 3.0 s" in found.notes[0]
    path.write_bytes(encode_wav(CLIP[:4_000]))
    found = read_medium(path, "audio", WHISPER)
    assert np.array_equal(found.values[:4_000], decode(encode_wav(CLIP[:4_000]), "audio"))
    assert not found.values[4_000:].any()
    assert "silence" in found.notes[0]
    found = read_medium(path, "audio", "an encoder of any length")
    assert found.values.shape == (4_000,)


def test_pictures_of_other_kinds_are_read(tmp_path):
    path = tmp_path / "a.jpg"
    for mode, kind in (("L", "JPEG"), ("RGBA", "PNG"), ("P", "GIF"), ("1", "PNG"), ("RGB", "WEBP")):
        Image.fromarray(PICTURE).convert(mode).save(path, kind)
        assert read_medium(path, "image", ImageEncoder.name).values.shape == (16, 16, 3)
    frames = [Image.fromarray(frame) for frame in FRAMES]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    assert read_medium(path, "video", "efficientnet-lite0-frames").values.shape == FRAMES.shape


def test_a_picture_that_its_camera_turned_is_seen_and_imported_upright(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x112] = 6  # a quarter to the left
    turned.save(tmp_path / "turned.png", exif=exif)
    upright = np.rot90(pixels, -1)
    seen = read_medium(tmp_path / "turned.png", "image", "efficientnet-lite0")
    assert np.array_equal(seen.values, upright)
    assert seen.notes == (f"{tmp_path / 'turned.png'}: was turned upright, as its EXIF says",)
    content = (tmp_path / "turned.png").read_bytes()
    row, values = fit_medium(content, "image", SourceSettings(folder="."))
    assert np.array_equal(values, upright) and np.array_equal(decode(row, "image"), upright)
    Image.fromarray(pixels).save(tmp_path / "plain.png")
    plain = (tmp_path / "plain.png").read_bytes()
    assert fit_medium(plain, "image", SourceSettings(folder="."))[0] == plain


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_pictures_of_more_than_8_bits_are_refused(dtype, tmp_path):
    path = tmp_path / "xray.tiff"
    Image.fromarray(np.linspace(0, 4000, 400).reshape(20, 20).astype(dtype)).save(path)
    with pytest.raises(MediaError, match=r"xray.tiff: holds values of more than 8 bits"):
        read_medium(path, "image", "efficientnet-lite0")
    with pytest.raises(MediaError, match="scale them to 8 bits"):
        fit_medium(path.read_bytes(), "image", SourceSettings(folder="."))
