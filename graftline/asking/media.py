"""Media from files of unknown origin: limits first, then the decoding that data rows have."""

from __future__ import annotations

import io
import math
import stat
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftline.data.rows import MAX_AUDIO_SECONDS, SAMPLE_RATE, MediaError, decode
from graftline.data.validation import SMALLEST
from graftline.errors import GraftlineError
from graftline.model.whisper import CLIP_SECONDS, WhisperAudioEncoder

MAX_FILE_BYTES = 1 << 30
MAX_POINTS = 250_000
"""A basis point set compares some 800 places with every point: 0.8 GB for that many."""
RATES = (4_000, 384_000)
"""Samples a second that sounds may have."""
_CLIPS = {WhisperAudioEncoder.name: CLIP_SECONDS}
"""Encoder -> seconds of sound that it takes, where it takes just so many."""
_REMEDIES = {
    "image": "Give a picture such as PNG or JPEG.",
    "audio": "Give a WAV; convert others with `ffmpeg -i FILE -ac 1 -ar 16000 out.wav`.",
    "video": "Give an animated PNG, GIF or WebP; convert others with "
    "`ffmpeg -i FILE -vf fps=8 -f apng out.png`.",
    "point_cloud": "Give a PLY in the format binary_little_endian 1.0 with float x, y, z.",
}


@dataclass(frozen=True)
class Medium:
    """One decoded medium.

    Attributes:
        modality: what it is.
        values: as `graftline.data.rows.decode` documents.
        notes: what was done to it that the user should know, a sentence each.
    """

    modality: str
    values: NDArray[Any]
    notes: tuple[str, ...] = ()


def read_medium(path: Path, modality: str, encoder: str) -> Medium:
    """Reads one media file and fits it to an encoder.

    A file as the data rows hold them is decoded by the same code, to the same numbers. A WAV of
    another rate, width or number of channels becomes 16 kHz mono; a sound is cut, or filled with
    silence, to the length that its encoder takes.

    Args:
        path: the file.
        modality: what it is said to be.
        encoder: name of the encoder that will see it.

    Raises:
        MediaError: the file is missing, empty, damaged, of another kind or absurdly large; names
            the file and says what to do.
    """
    remedy = _REMEDIES.get(modality, "")
    try:
        content = _content(path)
        if modality == "audio":
            values, notes = _sound(content, _CLIPS.get(encoder))
        else:
            values, notes = decode(content, modality), ()
        _check_size(values, modality)
    except MediaError as error:
        raise MediaError(f"{path}: {str(error).rstrip('.')}. {remedy}".rstrip()) from error
    return Medium(modality, values, tuple(f"{path}: {note}" for note in notes))


def _content(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise MediaError("is no regular file")
        if status.st_size == 0:
            raise MediaError("is empty (0 bytes)")
        if status.st_size > MAX_FILE_BYTES:
            raise MediaError(f"has {status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise MediaError("there is no such file") from error
    except (OSError, ValueError) as error:  # a name with a zero byte is a ValueError
        raise MediaError(f"cannot be read ({error})") from error


def _check_size(values: NDArray[Any], modality: str) -> None:
    least = SMALLEST[modality]
    if any(length < limit for length, limit in zip(values.shape, least, strict=True)):
        raise MediaError(f"has the shape {values.shape}; each axis must be at least {least}")
    if modality == "point_cloud" and len(values) > MAX_POINTS:
        raise MediaError(f"has {len(values)} points, more than the {MAX_POINTS} allowed; thin it")


def _sound(content: bytes, seconds: int | None) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """A WAV as float32 (samples,), 16 kHz mono, and what was changed."""
    channels, bits, rate, length = _wav_layout(content)
    notes = []
    if (channels, bits, rate) == (1, 16, SAMPLE_RATE):
        samples = decode(content, "audio")
    else:
        samples = _converted(content, seconds)
        notes.append(f"{channels} channel(s), {bits} bits, {rate} Hz became mono at 16 kHz")
    if seconds is None or (len(samples) == seconds * SAMPLE_RATE and length <= seconds):
        return samples, tuple(notes)
    if length > seconds:
        notes.append(f"only the first {seconds} s of {length:.1f} s are heard")
    else:
        notes.append(f"{length:.2f} s were filled with silence to {seconds} s")
    fitted = np.zeros(seconds * SAMPLE_RATE, np.float32)
    kept = samples[: len(fitted)]
    fitted[: len(kept)] = kept
    return fitted, tuple(notes)


def _wav_layout(content: bytes) -> tuple[int, int, int, float]:
    """Channels, bits, rate and seconds of a WAV, read from its header."""
    try:
        with wave.open(io.BytesIO(content), "rb") as stream:
            channels, bits = stream.getnchannels(), 8 * stream.getsampwidth()
            rate, count = stream.getframerate(), stream.getnframes()
    except Exception as error:
        raise MediaError(f"not a readable WAV ({len(content)} bytes): {error}") from error
    if count == 0:
        raise MediaError("holds no sound (0 s)")
    if not RATES[0] <= rate <= RATES[1]:
        raise MediaError(f"has {rate} samples a second; allowed are {RATES[0]} to {RATES[1]}")
    if count > MAX_AUDIO_SECONDS * rate:
        raise MediaError(f"lasts {count / rate:.0f} s; at most {MAX_AUDIO_SECONDS} s are read")
    if len(content) < count * channels * bits // 8:
        raise MediaError(f"is cut off: its header promises {count / rate:.1f} s of sound")
    return channels, bits, rate, count / rate


def _converted(content: bytes, seconds: int | None) -> NDArray[np.float32]:
    """Any linear WAV as float32 (samples,) in [-1, 1], 16 kHz mono; of a clip, its start alone."""
    from scipy.signal import resample_poly

    with wave.open(io.BytesIO(content), "rb") as stream:
        channels, width, rate = stream.getnchannels(), stream.getsampwidth(), stream.getframerate()
        # A little more than the clip, so that its last samples have neighbours to be made of.
        wanted = stream.getnframes() if seconds is None else (seconds * rate) + rate // 10
        data = stream.readframes(min(wanted, stream.getnframes()))
    mono: NDArray[np.float64] = _linear(data, width).reshape(-1, channels).mean(axis=1)
    common = math.gcd(rate, SAMPLE_RATE)
    if rate != SAMPLE_RATE:
        mono = resample_poly(mono, SAMPLE_RATE // common, rate // common)
    clipped: NDArray[np.float32] = np.clip(mono, -1.0, 1.0).astype(np.float32)
    return clipped


def _linear(data: bytes, width: int) -> NDArray[np.float64]:
    """PCM samples of 1 (unsigned), 2, 3 or 4 bytes as float64 in [-1, 1]."""
    if width == 1:
        return (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    if width == 3:
        octets = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(octets), 4), np.uint8)
        padded[:, 1:] = octets  # in the upper three bytes, so that the sign is where it belongs
        data, width = padded.tobytes(), 4
    if width not in (2, 4):
        raise MediaError(f"has samples of {8 * width} bits; 8, 16, 24 and 32 are read")
    samples: NDArray[np.float64] = np.frombuffer(data, f"<i{width}").astype(np.float64)
    return samples / 2.0 ** (8 * width - 1)


def named_error(path: Path, error: GraftlineError) -> MediaError:
    """What an encoder says against a medium, behind the file's name."""
    return MediaError(f"{path}: {error}")
