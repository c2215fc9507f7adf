"""WAV files of any rate, width and number of channels as mono sound at 16 kHz."""

from __future__ import annotations

import io
import math
import wave

import numpy as np
from numpy.typing import NDArray

from graftline.data.rows import MAX_AUDIO_SECONDS, SAMPLE_RATE, MediaError

RATES = (4_000, 384_000)
"""Samples a second that sounds may have."""


def wav_layout(
    content: bytes, max_seconds: float = MAX_AUDIO_SECONDS
) -> tuple[int, int, int, float]:
    """Channels, bits, rate and seconds of a WAV, read from its header.

    Raises:
        MediaError: no WAV, without sound, too long, cut off, or of an absurd rate.
    """
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
    if count > max_seconds * rate:
        raise MediaError(f"lasts {count / rate:.0f} s; at most {max_seconds:g} s are read")
    if len(content) < count * channels * bits // 8:
        raise MediaError(f"is cut off: its header promises {count / rate:.1f} s of sound")
    return channels, bits, rate, count / rate


def as_mono(content: bytes, seconds: int | None = None) -> NDArray[np.float32]:
    """Any linear WAV as float32 (samples,) in [-1, 1], 16 kHz mono.

    Args:
        content: a WAV that `wav_layout` lets pass.
        seconds: of a clip, so much of its start alone (and a little more).
    """
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


def fitted(samples: NDArray[np.float32], seconds: int) -> NDArray[np.float32]:
    """A sound cut, or filled with silence, to a length: float32 (seconds * 16,000,)."""
    clip = np.zeros(seconds * SAMPLE_RATE, np.float32)
    kept = samples[: len(clip)]
    clip[: len(kept)] = kept
    return clip


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
