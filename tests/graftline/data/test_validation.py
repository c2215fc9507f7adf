"""Every kind of broken file and row is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from graftline.data.encoding import encode_ply, encode_png, encode_wav
from graftline.data.validation import require_valid, validate
from graftline.errors import GraftlineError

Rows = list[dict[str, Any]]


def change(path: Path, edit: Callable[[Rows], None]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_good_build_has_no_problems(built: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    assert validate(built, progress=lambda *event: seen.append(event)) == []
    assert [done for _, done, _ in seen] == list(range(13))
    require_valid(built)


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("media", b"not a picture", "cannot be decoded: not a readable picture"),
        ("media", b"", "`media` is empty"),
        ("media", None, "`media` is empty"),
        ("media", encode_png(np.zeros((4, 64, 3), np.uint8)), "shape (4, 64, 3)"),
        ("task", "riddle", "unknown task 'riddle'"),
        ("task", None, "unknown task None"),
        ("question", " ", "`question` is empty"),
        ("answers", [], "`answers` is empty"),
        ("answers", None, "`answers` is empty"),
        ("answers", ["one", ""], "holds an empty answer"),
        ("source", "", "`source` is empty"),
        ("id", None, "`id` is empty"),
        ("id", "image-train-00004", "the id 'image-train-00004' is also in"),
    ],
)
def test_broken_rows_are_named(data: Path, column: str, value: object, words: str) -> None:
    path = data / "image" / "train.parquet"

    def edit(rows: Rows) -> None:
        rows[7][column] = value

    change(path, edit)
    problems = validate(data)
    assert [(problem.file, problem.row) for problem in problems] == [(str(path), 7)]
    assert words in problems[0].message
    assert str(problems[0]).startswith(f"{path}, row 7: ")


@pytest.mark.parametrize(
    ("modality", "media", "words"),
    [
        ("audio", encode_wav(np.zeros(10, np.int16)), "shape (10,)"),
        ("audio", b"RIFF", "not a readable WAV"),
        ("video", encode_png(np.zeros((64, 64), np.uint8)), "shape (1, 64, 64, 3)"),
        ("point_cloud", encode_ply(np.full((20, 3), np.nan, np.float32)), "NaN"),
        ("point_cloud", encode_ply(np.zeros((3, 3), np.float32)), "shape (3, 3)"),
    ],
)
def test_broken_media_of_each_modality(data: Path, modality: str, media: bytes, words: str) -> None:
    change(data / modality / "test.parquet", lambda rows: rows[2].update(media=media))
    (problem,) = validate(data)
    assert problem.row == 2
    assert words in problem.message


def test_repeats_across_splits_are_named_but_not_within_one(data: Path) -> None:
    train = pq.read_table(data / "image" / "train.parquet").to_pylist()

    def repeat(rows: Rows) -> None:
        rows[3].update(media=train[5]["media"])
        rows[4].update(source=train[6]["source"])
        rows[8].update(media=rows[9]["media"], source=rows[9]["source"])

    change(data / "image" / "test.parquet", repeat)
    problems = [(problem.row, problem.message) for problem in validate(data)]
    first = str(data / "image" / "train.parquet")
    assert problems == [
        (3, f"the same media is also in {first}, row 5"),
        (4, f"the source {train[6]['source']!r} also serves {first}, row 6"),
    ]


def test_a_source_may_not_serve_two_splits_of_two_modalities(data: Path) -> None:
    train = pq.read_table(data / "image" / "train.parquet").to_pylist()
    change(data / "video" / "test.parquet", lambda rows: rows[1].update(source=train[0]["source"]))
    (problem,) = validate(data)
    assert (problem.file, problem.row) == (str(data / "video" / "test.parquet"), 1)


def test_broken_files_are_all_named(data: Path) -> None:
    (data / "image" / "train.parquet").unlink()
    truncated = data / "audio" / "train.parquet"
    truncated.write_bytes(truncated.read_bytes()[:5000])
    renamed = data / "video" / "test.parquet"
    table = pq.read_table(renamed)
    pq.write_table(table.drop_columns(["source", "task"]), renamed)
    retyped = data / "point_cloud" / "test.parquet"
    table = pq.read_table(retyped)
    column = table.column_names.index("answers")
    pq.write_table(table.set_column(column, "answers", table.column("id")), retyped)
    empty = data / "point_cloud" / "validation.parquet"
    pq.write_table(pq.read_table(empty).slice(0, 0), empty)
    found = [(Path(p.file).relative_to(data).as_posix(), p.row, p.message) for p in validate(data)]
    assert [(file, row) for file, row, _ in found] == [
        ("image/train.parquet", None),
        ("audio/train.parquet", None),
        ("video/test.parquet", None),
        ("video/test.parquet", None),
        ("point_cloud/validation.parquet", None),
        ("point_cloud/test.parquet", None),
    ]
    words = ["missing", "readable parquet", "`task`", "`source`", "no rows", "has type string"]
    assert all(word in message for word, (_, _, message) in zip(words, found, strict=True))


def test_require_valid_lists_the_problems(data: Path) -> None:
    change(data / "image" / "test.parquet", lambda rows: rows[0].update(answers=[]))
    change(data / "audio" / "test.parquet", lambda rows: rows[1].update(task="x"))
    with pytest.raises(GraftlineError, match=r"2 problem\(s\)") as caught:
        require_valid(data)
    assert "image/test.parquet, row 0" in str(caught.value)
    assert "audio/test.parquet, row 1" in str(caught.value)


@pytest.mark.parametrize("own", [False, True])
def test_rebuilding_is_advised_for_the_starter_s_data_alone(data: Path, own: bool) -> None:
    name = "xray" if own else "image"
    (data / "image").rename(data / name)
    (data / name / "test.parquet").unlink()
    with pytest.raises(GraftlineError, match=f"{name}/test.parquet") as raised:
        require_valid(data, {name: "image"})
    assert ("graftline data build" in str(raised.value).partition("\n")[0]) is not own
