"""Own data by recipe: every source gives the same rows, in splits that share no medium."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from graftline.data.files import FileHashes
from graftline.data.kinds import decode_media
from graftline.data.rows import TASKS, column_problems, read_split
from graftline.data.sources.importing import Request, identity_of, import_rows
from graftline.data.streaming import SplitRows
from graftline.data.validation import validate
from graftline.errors import GraftlineError
from graftline.settings.sources import SourceSettings
from tests.graftline.data.own_media import (
    MAKERS,
    SPLITS,
    array,
    import_into,
    make_folder,
    picture,
    sound,
    write_csv,
    write_lines,
)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_folder_of_each_kind_becomes_valid_rows(tmp_path: Path, kind: str) -> None:
    given = make_folder(tmp_path / "mine", kind)
    found, rows = import_into(
        tmp_path / "own" / "thing", kind, "thing", folder=str(tmp_path / "mine")
    )
    assert found.problems == ()
    assert found.counts == {
        "train": {"question": 8},
        "validation": {"question": 1},
        "test": {"question": 1},
    }
    assert validate(tmp_path / "own", {"thing": kind}) == []
    media = [row["media"] for split in SPLITS for row in rows[split]]
    files = [(tmp_path / "mine" / row["file_name"]).read_bytes() for row in given]
    assert sorted(media) == sorted(files)
    assert {row["task"] for row in rows["train"]} <= set(TASKS)
    assert rows["train"][0]["id"] == "thing-train-00000"


def test_texts_of_one_medium_are_joined_and_stay_in_one_split(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    make_folder(folder, count=9)
    rows = []
    for number in range(9):
        name = f"{number:03d}.png"
        rows += [{"file_name": name, "caption": f"caption {k} of {number}"} for k in range(3)]
        rows.append({"file_name": name, "question": "How many?", "answers": [str(number), "some"]})
    shutil.copyfile(folder / "000.png", folder / "copy.png")
    rows.append({"file_name": "copy.png", "caption": "seen before"})
    (folder / "metadata.csv").unlink()
    write_lines(folder / "metadata.jsonl", rows)
    found, by_split = import_into(tmp_path / "out", folder=str(folder))
    assert found.problems == ()
    everything = [row for split in SPLITS for row in by_split[split]]
    assert len(everything) == 18
    first = [row for row in everything if "caption 0 of 0" in row["answers"]]
    assert [row["answers"] for row in first] == [
        ["caption 0 of 0", "caption 1 of 0", "caption 2 of 0", "seen before"]
    ]
    assert first[0]["question"] == "Describe this."
    sources = [{row["source"] for row in by_split[split]} for split in SPLITS]
    assert sum(map(len, sources)) == len(set.union(*sources)) == 9


def test_the_same_files_give_the_same_bytes_wherever_they_lie(tmp_path: Path) -> None:
    make_folder(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for name in ("here", "there"):
        import_into(tmp_path / f"{name}-rows", folder=str(tmp_path / name))
    for split in SPLITS:
        name = f"{split}.parquet"
        assert (tmp_path / "here-rows" / name).read_bytes() == (
            tmp_path / "there-rows" / name
        ).read_bytes()
    _, one = import_into(tmp_path / "one", folder=str(tmp_path / "here"), fractions={"seed": 1})
    _, zero = import_into(tmp_path / "zero", folder=str(tmp_path / "here"))
    assert [row["media"] for row in one["test"]] != [row["media"] for row in zero["test"]]


def test_the_identity_follows_content_not_time(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    rows = make_folder(folder)
    request = Request("photo", "image", SourceSettings(folder=str(folder)))
    memory = tmp_path / "memory" / "files.parquet"
    before = identity_of(request, FileHashes(memory))
    os.utime(folder / "003.png", (1, 1))
    assert identity_of(request, FileHashes(memory)) == before
    (folder / "003.png").write_bytes(picture(99))
    changed = identity_of(request, FileHashes(memory))
    assert changed != before
    rows[2]["answer"] = "green"
    write_csv(folder / "metadata.csv", rows)
    assert identity_of(request, FileHashes(memory)) not in (before, changed)
    memory.write_bytes(b"damaged")
    assert identity_of(request, FileHashes(memory)) == identity_of(request, FileHashes())


@pytest.mark.parametrize("form", ["bytes", "struct", "names", "categories", "views", "arrow"])
def test_columns_of_files_are_mapped(tmp_path: Path, form: str) -> None:
    media = [picture(number) for number in range(8)]
    for number, content in enumerate(media):
        (tmp_path / f"{number}.png").write_bytes(content)
    cells: dict[str, list[object]] = {
        "bytes": list(media),
        "struct": [{"bytes": content, "path": None} for content in media],
        "names": [f"{number}.png" for number in range(8)],
        "arrow": [{"bytes": content, "path": "x.png"} for content in media],
    }
    names = pa.array(cells["names"])
    cells["categories"], cells["views"] = names.dictionary_encode(), names.cast(pa.string_view())
    table = {
        "pic": cells[form],
        "ask": ["What?"] * 8,
        "said": [[f"a{n}", "b"] for n in range(8)],
        "part": ["train"] * 4 + ["val"] * 2 + ["test"] * 2,
        "other": [0] * 8,
    }
    if form == "arrow":
        datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")
        source = {"arrow": str(tmp_path / "saved" / "*.arrow")}
    else:
        pq.write_table(pa.table(table), tmp_path / "rows.parquet")
        source = {"parquet": str(tmp_path / "rows.parquet")}
    columns = {"media": "pic", "question": "ask", "answer": "said", "split": "part"}
    found, rows = import_into(tmp_path / "out", columns=columns, **source)
    assert found.problems == ()
    assert [len(rows[split]) for split in SPLITS] == [4, 2, 2]
    assert [row["media"] for split in SPLITS for row in rows[split]] == media
    assert rows["test"][1]["answers"] == ["a7", "b"]


def test_a_data_set_of_the_hub_is_read_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    pictures = [{"bytes": picture(number), "path": None} for number in range(9)]
    parts = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_dict(
                {"image": pictures[:6], "caption": list("abcdef")}, features=features
            ),
            "test": datasets.Dataset.from_dict(
                {"image": pictures[6:], "caption": list("ghi")}, features=features
            ),
        }
    )

    commit = "0123456789abcdef0123456789abcdef01234567"

    def load(path: str, **words: object) -> SimpleNamespace:
        asked.update(words, path=path)
        return SimpleNamespace(
            hash=commit, download_and_prepare=lambda: None, as_dataset=lambda: parts
        )

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    found, rows = import_into(tmp_path / "out", hub="lab/photos", revision=commit, config="small")
    assert asked == {"path": "lab/photos", "name": "small", "revision": commit}
    assert found.counts == {
        "train": {"caption": 5},
        "validation": {"caption": 1},
        "test": {"caption": 3},
    }
    assert rows["test"][0]["media"] == pictures[6]["bytes"]

    def refuse(path: str, **words: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    with pytest.raises(GraftlineError, match=r"lab/photos.*no route"):
        import_into(tmp_path / "again", hub="lab/photos", revision=commit)


def test_another_commit_of_the_hub_in_the_cache_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `datasets` lays out its cache; it takes the newest there when it finds no connection."""
    fetched, asked = "a" * 40, "b" * 40
    table = pa.table({"image": [picture(0)], "caption": ["of another commit"]})
    pq.write_table(table, tmp_path / "rows.parquet")
    files = {"train": str(tmp_path / "rows.parquet")}
    datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "made"))
    [made] = (tmp_path / "made").glob("parquet/*/*/*/dataset_info.json")
    held = tmp_path / "cache/lab___photos/default/0.0.0" / fetched
    shutil.copytree(made.parent, held)
    (held / "parquet-train.arrow").rename(held / "photos-train.arrow")
    info = json.loads((held / "dataset_info.json").read_text())
    info |= {"builder_name": "photos", "dataset_name": "photos"}
    (held / "dataset_info.json").write_text(json.dumps(info))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(GraftlineError, match=f"another commit, {fetched}.*HF_HUB_OFFLINE=0"):
        import_into(tmp_path / "out", hub="lab/photos", revision=asked)


def test_conversations_become_rows_without_their_marks(tmp_path: Path) -> None:
    talks = []
    for number in range(6):
        (tmp_path / f"{number}.jpg").write_bytes(picture(number, form="JPEG"))
        turns = [
            {"from": "human", "value": "<image>\nWhat is <|im_end|> this?"},
            {"from": "gpt", "value": f"Thing {number}."},
            {"from": "human", "value": "And its colour?"},
            {"from": "gpt", "value": "Grey."},
        ]
        talks.append({"id": str(number), "image": f"{number}.jpg", "conversations": turns})
    talks.append({"id": "text", "conversations": [{"from": "human", "value": "Hello"}]})
    talks.append({"image": "0.jpg", "conversations": [{"from": "gpt", "value": "I begin"}]})
    talks.append({"image": "missing.jpg", "conversations": talks[0]["conversations"]})
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    found, rows = import_into(tmp_path / "out", conversations=str(path))
    assert [problem.removeprefix(str(tmp_path)) for problem in found.problems] == [
        "/talks.json, row 7: `conversations` are not turns of human and gpt, one after the other",
        "/talks.json, row 8: missing.jpg: there is no such file",
    ]
    everything = [row for split in SPLITS for row in rows[split]]
    assert len(everything) == 12
    assert {row["question"] for row in everything} == {
        "What is <|im_end|> this?",
        "And its colour?",
    }


def test_splits_that_are_given_are_kept_and_missing_ones_drawn(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", count=10)
    rows = make_folder(tmp_path / "b", count=3)
    for number, row in enumerate(rows):
        (tmp_path / "b" / row["file_name"]).write_bytes(picture(100 + number))
    folders = {"train": str(tmp_path / "a"), "test": str(tmp_path / "b")}
    found, by_split = import_into(tmp_path / "out", folder=folders)
    assert found.problems == ()
    assert [len(by_split[split]) for split in SPLITS] == [9, 1, 3]
    assert {row["media"] for row in by_split["test"]} == {picture(100 + n) for n in range(3)}


def test_groups_stay_together(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "mine", count=12)
    for number, row in enumerate(rows):
        row["patient"] = f"p{number // 3}"
    write_csv(tmp_path / "mine" / "metadata.csv", rows)
    settings = {"columns": {"group": "patient"}, "fractions": {"validation": 0.25, "test": 0.25}}
    _, by_split = import_into(tmp_path / "out", folder=str(tmp_path / "mine"), **settings)
    assert [len(by_split[split]) for split in SPLITS] == [6, 3, 3]
    assert len({row["source"] for row in by_split["test"]}) == 1


def test_a_medium_in_two_given_splits_is_named(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "mine", count=6)
    for row, split in zip(rows, ["train", "train", "val", "test", "test", "train"], strict=True):
        row["split"] = split
    shutil.copyfile(tmp_path / "mine" / "000.png", tmp_path / "mine" / "003.png")
    write_csv(tmp_path / "mine" / "metadata.csv", rows)
    found, _ = import_into(tmp_path / "out", folder=str(tmp_path / "mine"))
    table = tmp_path / "mine" / "metadata.csv"
    assert found.problems == (
        f"{table}, line 5: the same medium is also in the split train ({table}, line 2)",
    )


def test_an_answer_that_only_the_test_split_has_is_a_warning(tmp_path: Path) -> None:
    rows = make_folder(tmp_path / "mine", count=6)
    for row, split in zip(rows, ["train", "train", "val", "test", "test", "train"], strict=True):
        row["split"] = split
    rows[4]["answer"] = "زرافة"
    write_csv(tmp_path / "mine" / "metadata.csv", rows)
    found, _ = import_into(tmp_path / "out", folder=str(tmp_path / "mine"))
    assert found.problems == ()
    [warning] = found.warnings
    assert "زرافة" in warning
    assert "metadata.csv, line 6" in warning


def test_sounds_of_any_rate_and_channels_become_16_khz_mono(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    rows = make_folder(folder, "audio", count=5)
    forms = [(44_100, 2, 2), (8_000, 1, 1), (48_000, 1, 3), (22_050, 6, 4), (16_000, 1, 2)]
    for row, (rate, channels, width) in zip(rows, forms, strict=True):
        (folder / row["file_name"]).write_bytes(sound(440.0, rate, channels, width))
    found, by_split = import_into(tmp_path / "out", "audio", folder=str(folder))
    assert found.problems == ()
    for row in (row for split in SPLITS for row in by_split[split]):
        samples = decode_media(row["media"], "audio")
        assert samples.shape == (16_000,)
        assert abs(int(np.abs(np.fft.rfft(samples)).argmax()) - 440) <= 1
        assert np.abs(samples).max() == pytest.approx(0.5, abs=0.03)


def test_media_are_never_all_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    rows = make_folder(folder, "features", count=100)
    for number, row in enumerate(rows):
        (folder / row["file_name"]).write_bytes(array(number, tokens=256, width=1024))
    request = Request("sensor", "features", SourceSettings(folder=str(folder)))
    (tmp_path / "out").mkdir()
    tracemalloc.start()
    found = import_rows(request, tmp_path / "out", FileHashes())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.problems == ()
    assert peak < 60e6  # of 105 MB


def test_lists_of_numbers_are_features(tmp_path: Path) -> None:
    values = [np.full((2, 3), number, np.float32).tolist() for number in range(6)]
    pq.write_table(pa.table({"features": values, "answer": ["x"] * 6}), tmp_path / "rows.parquet")
    found, rows = import_into(
        tmp_path / "out", "features", parquet=str(tmp_path / "rows.parquet"), question="State?"
    )
    assert found.problems == ()
    assert decode_media(rows["train"][0]["media"], "features").shape == (2, 3)


def test_a_split_is_streamed_as_it_is_read_whole(built: Path) -> None:
    whole = read_split(built, "audio", "train")
    path = built / "audio" / "train.parquet"
    rows = SplitRows(path, limit=20)
    assert len(rows) == 20
    pieces = [rows[start : start + 7] for start in (0, 7, 14)]
    again = rows[7:14]
    assert [m for piece in pieces for m in piece["media"]] == list(whole["media"])[:20]
    assert again == pieces[1]
    assert [row["id"] for row in rows.texts()] == list(whole["id"])[:20]
    pq.write_table(pq.read_table(path).drop_columns(["task"]), built.parent / "bad.parquet")
    with pytest.raises(GraftlineError, match="column `task` is missing"):
        SplitRows(built.parent / "bad.parquet")
    assert column_problems(pq.read_table(path)) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "give one of folder"),
        ({"folder": "a", "parquet": "b"}, "given: folder and parquet"),
        ({"hub": "lab/x"}, "needs a revision"),
        ({"hub": "lab/x", "revision": "main"}, "revision"),
        ({"folder": "a", "revision": "0" * 40}, "belong to hub"),
        ({"folder": "a", "fractions": {"validation": 0.5, "test": 0.5}}, "nothing to train on"),
        ({"folder": {"dev": "a"}}, "folder"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SourceSettings(**settings)
