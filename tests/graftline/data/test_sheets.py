"""Contact sheets of every kind of media, and what a check says of a data folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from graftline.data.checking import check_folder
from graftline.data.sheets import Example, contact_sheet, examples_of
from tests.graftline.data.own_media import MAKERS, import_into, make_folder


@pytest.mark.parametrize("kind", MAKERS)
def test_every_kind_has_a_sheet(tmp_path: Path, kind: str) -> None:
    make_folder(tmp_path / "mine", kind, count=12)
    import_into(tmp_path / "rows", kind, folder=str(tmp_path / "mine"))
    examples = examples_of(tmp_path / "rows")
    assert len(examples) == 6
    contact_sheet(tmp_path / "sheet.png", "my_thing", kind, examples)
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    cells = [half for row in np.split(pixels[50:], 2) for half in np.array_split(row, 4, axis=1)]
    busy = [len(np.unique(cell.reshape(-1, 3), axis=0)) > 20 for cell in cells]
    assert busy == [True] * 6 + [False] * 2


def test_texts_that_look_like_formulas_are_drawn_as_they_are(tmp_path: Path) -> None:
    one = Example("a", MAKERS["image"][0](1), "$\\frac{1}{$ شيء 猫", ("x_1^{", "<|im_end|>"))
    contact_sheet(tmp_path / "sheet.png", "a", "image", [one])
    assert (tmp_path / "sheet.png").stat().st_size > 1000


def test_a_data_folder_is_counted_drawn_and_its_bad_rows_named(data: Path, tmp_path: Path) -> None:
    path = data / "audio" / "test.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[5]["media"] = b"nothing"
    rows[6]["answers"] = ["never trained on"]
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)
    (data / "image").rename(data / "digit")
    found = check_folder(data, {"digit": "image", "audio": "audio"}, tmp_path / "out")
    digit, audio = found
    assert digit.problems == () and digit.sheet == tmp_path / "out" / "digit.png"
    assert digit.counts["train"] == {"question": 12, "caption": 12}
    [problem] = audio.problems
    assert problem.startswith(f"{path}, row 5: ")
    assert "'never trained on'" in audio.warnings[0] and "row 6" in audio.warnings[0]
    assert problem in (tmp_path / "out" / "audio.txt").read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"answers": None},
        {"media": None},
        {"question": None},
        {"drop": "answers"},
        {"drop": "question"},
        {"drop": "media"},
        {"drop": "task"},
    ],
)
def test_rows_that_lack_something_are_named_and_the_others_drawn(
    data: Path, tmp_path: Path, change: dict[str, str | None]
) -> None:
    path = data / "audio" / "train.parquet"
    table = pq.read_table(path)
    if column := change.pop("drop", None):
        table = table.drop_columns([column])
    else:
        rows = table.to_pylist()
        rows[2].update(change)
        schema = pa.schema([field.with_nullable(True) for field in table.schema])
        table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path)
    [audio] = check_folder(data, {"audio": "audio"}, tmp_path / "out")
    assert any(str(path) in problem for problem in audio.problems)
    assert audio.sheet == tmp_path / "out" / "audio.png"
    assert (tmp_path / "out" / "audio.txt").is_file()


def test_a_damaged_file_is_named_and_no_sheet_is_drawn(data: Path, tmp_path: Path) -> None:
    path = data / "audio" / "train.parquet"
    content = bytearray(path.read_bytes())
    content[100 : len(content) // 2] = b"\xff" * (len(content) // 2 - 100)
    path.write_bytes(content)
    [audio] = check_folder(data, {"audio": "audio"}, tmp_path / "out")
    assert any(str(path) in problem for problem in audio.problems)
    assert audio.sheet is None
