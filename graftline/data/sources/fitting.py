"""Media of any origin as the rows hold them: checked, limited, sounds as 16 kHz mono."""

from __future__ import annotations

import io
import warnings
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from PIL.ExifTags import Base

from graftline.data.encoding import encode_wav
from graftline.data.kinds import check_size, decode_media
from graftline.data.rows import MAX_AUDIO_SECONDS, MAX_PIXELS, SAMPLE_RATE, MediaError
from graftline.data.wav import as_mono, wav_layout
from graftline.settings.sources import SourceSettings

REMEDIES = {
    "image": "Give a picture such as PNG or JPEG.",
    "audio": "Give a WAV; convert others with `ffmpeg -i FILE -ac 1 -ar 16000 out.wav`.",
    "video": "Give an animated PNG, GIF or WebP; convert others with "
    "`ffmpeg -i FILE -vf fps=8 -f apng out.png`.",
    "point_cloud": "Give a PLY in the format binary_little_endian 1.0 with float x, y, z.",
    "features": "Give an npy file of float16 or float32 (tokens, width).",
}
"""What to do about a medium that is not what it should be."""


def fit_medium(content: bytes, kind: str, settings: SourceSettings) -> tuple[bytes, NDArray[Any]]:
    """Checks a medium and gives its bytes as a row holds them.

    Pictures, videos, point clouds and features stay as they are, byte for byte, but for a picture
    that its camera noted as turned: it is turned upright. A WAV of another rate, width or number of
    channels becomes 16 kHz, 16 bits, mono.

    Args:
        content: the bytes of a file, whatever its name says.
        kind: what it should be.
        settings: its limits.

    Returns:
        The bytes, and the decoded medium as `decode_media` says.

    Raises:
        MediaError: damaged, of another kind, or beyond a limit; says what to do.
    """
    try:
        if not content:
            raise MediaError("is empty (0 bytes)")
        if kind in ("image", "video"):
            _check_pixels(content, min(settings.max_pixels or MAX_PIXELS, MAX_PIXELS))
            content = upright(content)
        if kind == "audio":
            content = _wav(content, min(settings.max_seconds, MAX_AUDIO_SECONDS))
        values = decode_media(content, kind)
        check_size(values, kind)
    except MediaError as error:
        raise MediaError(f"{str(error).rstrip('.')}. {REMEDIES[kind]}") from error
    return content, values


def _check_pixels(content: bytes, most: int) -> None:
    """Reads a picture's header alone; what is no picture is named by the decoder."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as picture:
                width, height = picture.size
                frames = int(getattr(picture, "n_frames", 1))
    except Exception:
        return
    if width * height * frames > most:
        raise MediaError(
            f"has {width} x {height} pixels{f' in {frames} frames' if frames > 1 else ''}, more "
            f"than the {most} that max_pixels allows"
        )


def upright(content: bytes) -> bytes:
    """A picture as people see it: the same bytes, or turned as its EXIF says, as PNG.

    Raises:
        MediaError: its values have more than 8 bits, of which a decoder to RGB keeps the lowest or
            the highest end alone.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            mode = picture.mode
            turned = picture.getexif().get(Base.Orientation, 1) not in (0, 1)
            large = picture.width * picture.height > MAX_PIXELS  # the decoder says so
            if not turned or large or getattr(picture, "n_frames", 1) > 1:
                found = content
            else:
                stream = io.BytesIO()
                ImageOps.exif_transpose(picture.convert("RGB")).save(stream, "PNG")
                found = stream.getvalue()
    except Exception:
        return content  # the decoder names what is wrong with it
    if mode.startswith(("I", "F")):
        raise MediaError(
            f"holds values of more than 8 bits (Pillow's mode {mode}), which would become black "
            "and white; scale them to 8 bits as your data need it (for 12 bits: divide by 16)"
        )
    return found


def _wav(content: bytes, most: float) -> bytes:
    layout = wav_layout(content, most)
    if layout[:3] == (1, 16, SAMPLE_RATE):
        return content
    samples = np.clip(np.rint(mono_sound(content).astype(np.float64) * 32768), -32768, 32767)
    return encode_wav(samples.astype(np.int16))


def mono_sound(content: bytes, seconds: int | None = None) -> NDArray[np.float32]:
    """What `as_mono` makes of a WAV of which all is there.

    Args:
        content: a WAV that `wav_layout` lets pass, which counts the header as sound.
        seconds: of a clip, so much of its start alone.

    Raises:
        MediaError: the last samples are missing, or are of a width that is not read.
    """
    with wave.open(io.BytesIO(content), "rb") as stream:
        count = stream.getnframes()
        promised = count * stream.getnchannels() * stream.getsampwidth()
        found = len(stream.readframes(count))
    if found < promised:
        raise MediaError(f"is cut off: it has {found} of {promised} bytes of sound")
    return as_mono(content, seconds)
