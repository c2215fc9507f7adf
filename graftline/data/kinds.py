"""What a modality's rows can hold, whatever the modality is called."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import EpsImagePlugin

from graftline.data.rows import MediaError, decode

FEATURES = "features"
SMALLEST = {
    "image": (8, 8, 3),
    "audio": (1600,),
    "video": (2, 8, 8, 3),
    "point_cloud": (16, 3),
    FEATURES: (1, 1),
}
"""Least length of each axis of a decoded medium."""
EpsImagePlugin.gs_binary = False  # a picture is data: Pillow would have Ghostscript run PostScript
_DTYPES = ("float16", "float32")
_HEADERS: dict[tuple[int, int], Any] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def decode_media(media: bytes, kind: str) -> NDArray[Any]:
    """Decode the bytes of one medium by what it is.

    Args:
        media: encoded bytes.
        kind: image, audio, video, point_cloud or features.

    Returns:
        features: float16 or float32 (tokens, width), as stored; the others as
        `graftline.data.rows.decode` says.

    Raises:
        MediaError: the bytes are damaged, empty, of another kind or absurdly large.
        GraftlineError: there is no such kind.
    """
    return decode_features(media) if kind == FEATURES else decode(media, kind)


def decode_features(media: bytes) -> NDArray[Any]:
    """Read an array of features, npy bytes, without ever unpickling.

    The header is compared with the bytes before anything is allocated.

    Args:
        media: an npy file, float16 or float32, (tokens, width).

    Returns:
        (tokens, width), in the stored dtype and the machine's byte order.

    Raises:
        MediaError: not such a file, cut off, or with values that are not finite.
    """
    stream = io.BytesIO(media)
    try:
        shape, by_columns, dtype = _HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception as error:
        raise MediaError(f"not a readable npy file ({len(media)} bytes): {error}") from error
    if dtype.name not in _DTYPES or len(shape) != 2 or min(shape) < 1:
        raise MediaError(
            f"an array of {dtype} {tuple(shape)}; features are float16 or float32 (tokens, width)"
        )
    body, expected = media[stream.tell() :], shape[0] * shape[1] * dtype.itemsize
    if len(body) != expected:
        raise MediaError(f"{len(body)} bytes of values, {tuple(shape)} of {dtype} need {expected}")
    values = np.frombuffer(body, dtype).reshape(shape, order="F" if by_columns else "C")
    if not np.isfinite(values).all():
        raise MediaError("the features hold NaN or infinite values")
    return np.ascontiguousarray(values, dtype=dtype.newbyteorder("="))


def encode_features(values: NDArray[Any]) -> bytes:
    """Write features, float16 or float32 (tokens, width), as npy bytes.

    Raises:
        MediaError: the array has another dtype or shape.
    """
    if values.dtype.name not in _DTYPES or values.ndim != 2:
        raise MediaError(
            f"an array of {values.dtype} {values.shape}; features are float16 or float32 "
            "(tokens, width)"
        )
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(values), (1, 0), allow_pickle=False)
    return stream.getvalue()


def check_size(values: NDArray[Any], kind: str) -> None:
    """Refuse a decoded medium that is absurdly small.

    Raises:
        MediaError: names its shape and the least one.
    """
    least = SMALLEST[kind]
    if any(length < limit for length, limit in zip(values.shape, least, strict=True)):
        raise MediaError(f"has the shape {values.shape}; each axis must be at least {least}")


def kinds_of(modalities: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Modality -> what its rows hold, for modalities that are named with or without it."""
    if isinstance(modalities, Mapping):
        return dict(modalities)
    return {name: name for name in modalities}
