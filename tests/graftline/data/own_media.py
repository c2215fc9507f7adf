"""Files as users have them: pictures, sounds, films, points, arrays, and tables that name them."""

from __future__ import annotations

import csv
import io
import json
import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from graftline.data.encoding import encode_animated_png, encode_ply
from graftline.data.files import FileHashes
from graftline.data.kinds import encode_features
from graftline.data.sources.importing import Imported, Request, import_rows
from graftline.data.streaming import open_parquet
from graftline.settings.sources import SourceSettings

SPLITS = ("train", "validation", "test")


def picture(number: int, side: int = 24, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form)
    return stream.getvalue()


def sound(
    hertz: float, rate: int = 16_000, channels: int = 1, width: int = 2, seconds: float = 1.0
) -> bytes:
    """A tone as WAV; 8 bits are unsigned."""
    times = np.arange(int(rate * seconds)) / rate
    tone = 0.5 * np.sin(2 * np.pi * hertz * times)
    if width == 1:
        samples = (tone * 127 + 128).astype(np.uint8).tobytes()
        frames = b"".join(bytes([value]) * channels for value in samples)
    else:
        whole = (tone * (2 ** (8 * width - 1) - 1)).astype("<i4")
        octets = whole.view(np.uint8).reshape(-1, 4)[:, :width]
        frames = np.repeat(octets[:, None], channels, axis=1).tobytes()
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(frames)
    return stream.getvalue()


def film(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (4, 16, 16), np.uint8)
    return encode_animated_png(pixels, 100)


def points(number: int) -> bytes:
    return encode_ply(np.random.default_rng(number).normal(size=(40, 3)).astype(np.float32))


def array(number: int, tokens: int = 3, width: int = 5) -> bytes:
    values = np.random.default_rng(number).normal(size=(tokens, width))
    return encode_features(values.astype(np.float32))


MAKERS = {
    "image": (picture, "png"),
    "audio": (lambda number: sound(200 + 50 * number), "wav"),
    "video": (film, "png"),
    "point_cloud": (points, "ply"),
    "features": (array, "npy"),
}


def make_folder(
    folder: Path, kind: str = "image", count: int = 10, answers: tuple[str, ...] = ("red", "blue")
) -> list[dict[str, Any]]:
    """Media and a metadata.csv with a question for each; returns its rows."""
    folder.mkdir(parents=True, exist_ok=True)
    maker, ending = MAKERS[kind]
    rows = []
    for number in range(count):
        name = f"{number:03d}.{ending}"
        (folder / name).write_bytes(maker(number))
        answer = answers[number % len(answers)]
        rows.append({"file_name": name, "question": "Which?", "answer": answer})
    write_csv(folder / "metadata.csv", rows)
    return rows


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")


def import_into(
    out: Path, kind: str = "image", name: str = "photo", **settings: Any
) -> tuple[Imported, dict[str, list[dict[str, Any]]]]:
    """What an import found, and its rows by split."""
    out.mkdir(parents=True, exist_ok=True)
    request = Request(name, kind, SourceSettings(**settings))
    found = import_rows(request, out, FileHashes())
    rows = {split: open_parquet(out / f"{split}.parquet").read().to_pylist() for split in SPLITS}
    return found, rows
