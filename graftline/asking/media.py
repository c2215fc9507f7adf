"""Media from files of unknown origin: limits first, then the decoding that data rows have."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graftline.data.files import read_file
from graftline.data.kinds import check_size, decode_media
from graftline.data.rows import SAMPLE_RATE, MediaError, decode
from graftline.data.sources.fitting import REMEDIES, mono_sound, upright
from graftline.data.wav import fitted, wav_layout
from graftline.errors import GraftlineError
from graftline.model.clips import CLIPS

MAX_POINTS = 250_000
"""A basis point set compares some 800 places with every point: 0.8 GB for that many."""


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


def read_medium(path: Path, modality: str, encoder: str, kind: str | None = None) -> Medium:
    """Reads one media file and fits it to an encoder.

    A file as the data rows hold them is decoded by the same code, to the same numbers. A WAV of
    another rate, width or number of channels becomes 16 kHz mono; a sound is cut, or filled with
    silence, to the length that its encoder takes.

    Args:
        path: the file.
        modality: whose it is said to be.
        encoder: name of the encoder that will see it.
        kind: what it should be; as the modality is called if left out.

    Raises:
        MediaError: the file is missing, empty, damaged, of another kind or absurdly large; names
            the file and says what to do.
    """
    kind = kind or modality
    remedy = REMEDIES.get(kind, "")
    try:
        content = read_file(path)
        if kind == "audio":
            values, notes = _sound(content, CLIPS.get(encoder))
        else:
            seen = upright(content) if kind in ("image", "video") else content
            values = decode_media(seen, kind)
            notes = () if seen == content else ("was turned upright, as its EXIF says",)
        check_size(values, kind)
        if kind == "point_cloud" and len(values) > MAX_POINTS:
            raise MediaError(
                f"has {len(values)} points, more than the {MAX_POINTS} allowed; thin it"
            )
    except MediaError as error:
        raise MediaError(f"{path}: {str(error).rstrip('.')}. {remedy}".rstrip()) from error
    return Medium(modality, values, tuple(f"{path}: {note}" for note in notes))


def _sound(content: bytes, seconds: int | None) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """A WAV as float32 (samples,), 16 kHz mono, and what was changed."""
    channels, bits, rate, length = wav_layout(content)
    notes = []
    if (channels, bits, rate) == (1, 16, SAMPLE_RATE):
        samples = decode(content, "audio")
    else:
        samples = mono_sound(content, seconds)
        notes.append(f"{channels} channel(s), {bits} bits, {rate} Hz became mono at 16 kHz")
    if seconds is None or (len(samples) == seconds * SAMPLE_RATE and length <= seconds):
        return samples, tuple(notes)
    if length > seconds:
        notes.append(f"only the first {seconds} s of {length:.1f} s are heard")
    else:
        notes.append(f"{length:.2f} s were filled with silence to {seconds} s")
    return fitted(samples, seconds), tuple(notes)


def named_error(path: Path, error: GraftlineError) -> MediaError:
    """What an encoder says against a medium, behind the file's name."""
    return MediaError(f"{path}: {error}")
