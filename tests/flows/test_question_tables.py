"""A table of questions, answered."""

from __future__ import annotations

import csv
import io
import shutil
from pathlib import Path

import pytest

from flows import using
from graftline.asking.asker import Asker
from graftline.errors import GraftlineError
from tasks.models import find_parts
from tests.flows.used import MODALITIES, QUIET, RECIPE, ROWS, cli, echo, medium

pytestmark = pytest.mark.usefixtures("in_used")


def _table(path, lines):
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(lines)
    return path


def test_each_row_of_a_table_gets_its_own_answer(used, tmp_path, monkeypatch):
    monkeypatch.setattr("graftline.asking.asker.answer_batches", echo)
    monkeypatch.setattr(using, "BATCH", 5)  # several batches
    monkeypatch.setattr("graftline.asking.table._SORTED", 2)  # and several times that
    asker, lines, expected = Asker(find_parts(RECIPE, {})), [], []
    for number in range(ROWS):
        for place, modality in enumerate(MODALITIES):
            question = f"{'Really? ' * place}What is {number}?"
            media = [(modality, medium(modality, number))]
            if number == 0 and modality == "video":
                media.insert(0, ("image", medium("image", 1)))
            cells = [str(dict(media).get(name, "")) for name in MODALITIES]
            lines.append([f"row {len(lines)}", *cells, question])
            expected.append([*lines[-1], using.ask(asker, media, question, QUIET)])
    header = ["id", *MODALITIES, "question"]
    table = _table(used / "questions.csv", [header, *lines])
    result = cli("ask", RECIPE, "--table", table, "--out", tmp_path / "answers.csv")
    assert result.exit_code == 0, result.output
    assert "16 answers" in result.stdout
    text = (tmp_path / "answers.csv").read_text(encoding="utf-8")
    assert list(csv.reader(io.StringIO(text))) == [[*header, "answer"], *expected]
    assert len({row[-1] for row in expected}) == 16
    assert [path.name for path in tmp_path.iterdir()] == ["answers.csv"]


def test_all_bad_rows_are_listed_before_anything_is_asked(used, tmp_path, monkeypatch):
    monkeypatch.setattr(using.Asker, "loaded", property(lambda _self: pytest.fail("was loaded")))
    place = tmp_path / "table"
    place.mkdir()
    good, outside = place / "good.png", tmp_path / "outside.png"
    for path in (good, outside):
        shutil.copy(used / medium("image"), path)
    (place / "link.png").symlink_to(outside)
    (place / "folder").symlink_to(tmp_path)
    (place / "cut.png").write_bytes(good.read_bytes()[:100])
    names = ["good.png", "", "../outside.png", outside, "link.png", "folder/outside.png", "cut.png"]
    lines = [[name, "What?"] for name in names] + [["good.png", " "], ["good.png"]]
    lines.append(["good.png", "why " * 600])
    table = _table(place / "questions.csv", [["image", "question"], *lines])
    with pytest.raises(GraftlineError) as error:
        using.ask_table(Asker(find_parts(RECIPE, {})), table, tmp_path / "answers.csv", QUIET)
    found = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert [line.partition(":")[0] for line in found] == [f"line {n}" for n in range(4, 12)]
    assert all("leads out of" in line for line in found[:4])
    assert "cut.png" in found[4] and "question is empty" in found[5]
    assert "has 1 fields, the header 2" in found[6]
    assert "the conversation takes" in found[7]
    assert not (tmp_path / "answers.csv").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"question\n", "no rows"),
        (b"image,text\na,b\n", "no column `question`"),
        (b"question,answer\na,b\n", "`answer` already"),
        (b"question,question\na,b\n", "more than once"),
        (b"imagee,question\na,b\n", "if it names media, call it 'image'"),
        (b"question\n\xff\xfe\n", "not UTF-8"),
        (b'question\n"a\n', "not a readable CSV"),
    ],
)
def test_what_is_no_table_is_refused(content, words, tmp_path):
    table = tmp_path / "questions.csv"
    table.write_bytes(content)
    asker = Asker(find_parts(RECIPE, {}))
    with pytest.raises(GraftlineError, match=words):
        using.ask_table(asker, table, tmp_path / "answers.csv", QUIET)
    with pytest.raises(GraftlineError, match="table of questions itself"):
        using.ask_table(asker, table, table, QUIET)


def test_nothing_is_overwritten_and_nothing_asked_in_vain(tmp_path, monkeypatch):
    monkeypatch.setattr(using, "read_questions", lambda *_: pytest.fail("was read"))
    picture, away = tmp_path / "cat.png", tmp_path / "away.csv"
    picture.write_bytes(b"a picture")
    away.symlink_to(tmp_path / "nowhere.csv")
    asker = Asker(find_parts(RECIPE, {}))
    for out in (picture, away, tmp_path):
        with pytest.raises(GraftlineError, match="is there already; choose another --out"):
            using.ask_table(asker, tmp_path / "questions.csv", out, QUIET)
    assert picture.read_bytes() == b"a picture"
    for folder in (tmp_path / "none", Path("/proc")):
        with pytest.raises(GraftlineError, match="answers.csv: cannot be written"):
            using.ask_table(asker, tmp_path / "questions.csv", folder / "answers.csv", QUIET)
