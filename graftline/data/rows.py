"""The rows of the data sets: their shape, how they are decoded, and how a split is read."""

from __future__ import annotations

import io
import warnings
import wave
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageSequence

from graftline.errors import GraftlineError

Modality = Literal["image", "audio", "video", "point_cloud"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
SPLITS = ("train", "validation", "test")
TASKS = ("question", "caption")
COLUMNS = ("id", "media", "task", "question", "answers", "source")

SAMPLE_RATE = 16_000
MAX_PIXELS = 64 * 1024 * 1024
MAX_AUDIO_SECONDS = 30 * 60
MAX_POINTS = 10_000_000
_MAX_HEADER_BYTES = 64 * 1024


class MediaError(GraftlineError):
    """The bytes of one media cannot be decoded."""


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        id: Unique name within all splits.
        media: Encoded bytes: PNG, WAV, animated PNG or binary PLY.
        task: `question` or `caption`.
        question: The prompt.
        answers: Accepted answers; the first one is trained on.
        source: The raw material (a digit, a note, a shape's parameters); serves one split only.
    """

    id: str
    media: bytes
    task: str
    question: str
    answers: list[str]
    source: str


def decode(media: bytes, modality: str) -> NDArray[Any]:
    """Decode the bytes of one media.

    Args:
        media: Encoded bytes.
        modality: One of `MODALITIES`.

    Returns:
        image: uint8, (height, width, 3). audio: float32 in [-1, 1], (samples,), mono, 16 kHz.
        video: uint8, (frames, height, width, 3). point_cloud: float32, (points, 3).

    Raises:
        MediaError: The bytes are damaged, empty, of another kind or absurdly large.
        GraftlineError: The modality is unknown.
    """
    if modality == "image":
        return decode_image(media)
    if modality == "audio":
        return decode_audio(media)
    if modality == "video":
        return decode_video(media)
    if modality == "point_cloud":
        return decode_point_cloud(media)
    raise GraftlineError(f"unknown modality {modality!r}; known are {', '.join(MODALITIES)}")


def _open_picture(media: bytes) -> Image.Image:
    """Open a picture and refuse absurd sizes before any pixel is decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(media))
    except Image.DecompressionBombError as error:
        raise MediaError(f"the picture is too large: {error}") from error
    except Exception as error:
        raise MediaError(f"not a readable picture ({len(media)} bytes): {error}") from error
    pixels = picture.width * picture.height * int(getattr(picture, "n_frames", 1))
    if pixels > MAX_PIXELS:
        raise MediaError(
            f"the picture has {pixels} pixels in all its frames, more than the {MAX_PIXELS} allowed"
        )
    return picture


def decode_image(media: bytes) -> NDArray[np.uint8]:
    """Decode a picture to uint8 (height, width, 3); see `decode`."""
    picture = _open_picture(media)
    try:
        return np.asarray(picture.convert("RGB"), dtype=np.uint8)
    except Exception as error:
        raise MediaError(f"the picture is damaged: {error}") from error


def decode_video(media: bytes) -> NDArray[np.uint8]:
    """Decode an animated picture to uint8 (frames, height, width, 3); see `decode`."""
    picture = _open_picture(media)
    try:
        frames = [np.asarray(f.convert("RGB"), np.uint8) for f in ImageSequence.Iterator(picture)]
        return np.stack(frames)
    except Exception as error:
        raise MediaError(f"the video is damaged: {error}") from error


def decode_audio(media: bytes) -> NDArray[np.float32]:
    """Decode a 16 kHz, 16-bit mono WAV to float32 (samples,) in [-1, 1]; see `decode`."""
    try:
        with wave.open(io.BytesIO(media), "rb") as stream:
            shape = (stream.getnchannels(), stream.getsampwidth() * 8, stream.getframerate())
            count = stream.getnframes()
            if count > MAX_AUDIO_SECONDS * stream.getframerate():
                raise MediaError(f"the sound is longer than {MAX_AUDIO_SECONDS} s")
            data = stream.readframes(count)
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"not a readable WAV ({len(media)} bytes): {error}") from error
    if shape != (1, 16, SAMPLE_RATE):
        raise MediaError(
            f"the WAV has {shape[0]} channels, {shape[1]} bits, {shape[2]} Hz; expected 1 channel, "
            f"16 bits, {SAMPLE_RATE} Hz. Convert it first."
        )
    if count == 0 or len(data) != 2 * count:
        raise MediaError(f"the WAV is empty or cut off: {len(data) // 2} of {count} samples")
    return np.frombuffer(data, dtype="<i2").astype(np.float32) / np.float32(32768)


def decode_point_cloud(media: bytes) -> NDArray[np.float32]:
    """Decode a binary PLY with float x, y, z to float32 (points, 3); see `decode`."""
    end = media.find(b"end_header\n", 0, _MAX_HEADER_BYTES)
    if not media.startswith(b"ply\n") or end < 0:
        raise MediaError(f"not a PLY file with a header ({len(media)} bytes)")
    count, body = _ply_layout(media[:end]), media[end + len(b"end_header\n") :]
    if not 0 < count <= MAX_POINTS:
        raise MediaError(f"the PLY says it has {count} points; allowed are 1 to {MAX_POINTS}")
    if len(body) != 12 * count:
        raise MediaError(
            f"the PLY holds {len(body)} bytes of points, {count} points need {12 * count}"
        )
    points = np.frombuffer(body, dtype="<f4").reshape(count, 3).astype(np.float32)
    if not np.isfinite(points).all():
        raise MediaError("the point cloud holds NaN or infinite coordinates")
    return points


def _ply_layout(header: bytes) -> int:
    """Return the number of points of a PLY header, refusing what is not plain x, y, z floats."""
    lines = [line.split() for line in header.decode("ascii", "replace").splitlines()[1:]]
    lines = [line for line in lines if line and line[0] not in ("comment", "obj_info")]
    if not lines or lines[0] != ["format", "binary_little_endian", "1.0"]:
        raise MediaError("the PLY is not in the format `binary_little_endian 1.0`")
    elements = [line for line in lines if line[0] == "element"]
    if len(elements) != 1 or elements[0][1:2] != ["vertex"] or len(elements[0]) != 3:
        raise MediaError("the PLY must hold the one element `vertex`")
    properties = [line for line in lines if line[0] == "property"]
    names = [line[-1] for line in properties]
    if names != ["x", "y", "z"] or any(line[1] not in ("float", "float32") for line in properties):
        raise MediaError("the PLY's properties must be float x, float y, float z")
    if not elements[0][2].isdigit():
        raise MediaError(f"the PLY's number of points is not a number: {elements[0][2]!r}")
    return int(elements[0][2])


def schema() -> pa.Schema:
    """Return the columns of a split's parquet file."""
    text = pa.string()
    types = {"media": pa.binary(), "answers": pa.list_(text)}
    return pa.schema([(name, types.get(name, text)) for name in COLUMNS])


def split_file(folder: Path, modality: str, split: str) -> Path:
    """Return the parquet file of a split."""
    return folder / modality / f"{split}.parquet"


def read_table(path: Path) -> pa.Table:
    """Read a parquet file into memory.

    Raises:
        GraftlineError: The file is missing, truncated or not parquet.
    """
    if not path.is_file():
        raise GraftlineError(f"{path} is missing; run `graftline data build` to make it")
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise GraftlineError(
            f"{path} is not a readable parquet file ({error}); delete it and run "
            "`graftline data build`"
        ) from error


def column_problems(table: pa.Table) -> list[str]:
    """Return what is wrong with the columns of a table: missing ones and wrong types."""
    problems = []
    for field in schema():
        if field.name not in table.column_names:
            problems.append(f"column `{field.name}` is missing")
            continue
        found = table.schema.field(field.name).type
        if not _same_type(found, field.type):
            problems.append(f"column `{field.name}` has type {found}, expected {field.type}")
    return problems


def _same_type(found: pa.DataType, expected: pa.DataType) -> bool:
    if pa.types.is_list(expected):
        lists = pa.types.is_list(found) or pa.types.is_large_list(found)
        return lists and _same_type(found.value_type, expected.value_type)
    if pa.types.is_binary(expected):
        return bool(pa.types.is_binary(found) or pa.types.is_large_binary(found))
    return bool(pa.types.is_string(found) or pa.types.is_large_string(found))


def read_split(folder: Path, modality: str, split: str) -> Any:
    """Read one split as a `datasets.Dataset` (held in memory, no cache files).

    Args:
        folder: The data folder, holding a folder for each modality.
        modality: For example `image`.
        split: For example `train`.

    Returns:
        A `datasets.Dataset` with the columns `COLUMNS`; `media` are encoded bytes for `decode`.

    Raises:
        GraftlineError: The file is missing, damaged or has other columns.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    path = split_file(folder, modality, split)
    table = read_table(path)
    problems = column_problems(table)
    if problems:
        raise GraftlineError(
            f"{path}: {'; '.join(problems)}. Mend it or run `graftline data build`."
        )
    table = table.select(list(COLUMNS)).replace_schema_metadata(None)
    return Dataset(InMemoryTable(table))


def as_columns(rows: Sequence[Row]) -> dict[str, list[object]]:
    """Return rows as columns, ready for `datasets.Dataset.from_dict`."""
    return {name: [cast(object, getattr(row, name)) for row in rows] for name in COLUMNS}
