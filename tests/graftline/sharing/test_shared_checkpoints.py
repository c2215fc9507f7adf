"""What is finished of unfinished steps reaches other machines, and nothing else of it is used."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from graftline.sharing import checkpoints
from graftline.sharing.store import SharedStore
from tests.graftline.stored import build, publish


def _checkpoint(work: Path, step: int, text: str) -> None:
    temporary = work / ".tmp-checkpoint"
    temporary.mkdir()
    (temporary / "optimizer.safetensors").write_text(text)
    (temporary / "record.json").write_text(json.dumps({"step": step}))
    temporary.rename(work / f"checkpoint-{step:08d}")


def _left(store: SharedStore) -> list[str]:
    found = store._objects.find(f"{store.url}/.checkpoints")
    return sorted(path.partition("/.checkpoints/")[2] for path in found)


@pytest.mark.parametrize("damage", ["", "flipped", "half sent"])
def test_another_machine_goes_on_from_the_last_checkpoint(
    url: str, elsewhere: Any, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SECONDS", 0.05)
    store = elsewhere(url, "first")
    seen: list[str] = []

    def stopped(_: Path) -> None:
        work = store.work_folder("merge", "f1")
        _checkpoint(work, 50, "fifty")
        deadline = time.monotonic() + 30
        while "merge-f1/checkpoint-00000050/files.json" not in _left(store):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        _checkpoint(work, 100, "a hundred")
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="is gone"):
        publish(store, make=stopped)
    name = "checkpoint-00000100"
    names = [f"{name}/optimizer.safetensors", f"{name}/record.json", "files.json"]
    assert _left(store) == [f"merge-f1/{name}/{file}" for file in names]
    place = f"{url}/.checkpoints/merge-f1/{name}"
    if damage == "flipped":
        store._objects.pipe_file(f"{place}/{name}/optimizer.safetensors", b"b hundred")
    elif damage:
        store._objects.rm_file(f"{place}/files.json")
    other = elsewhere(url)

    def goes_on(folder: Path) -> None:
        work = other.work_folder("merge", "f1")
        seen.extend(sorted(path.name for path in work.iterdir()))
        if seen:
            file = work / "checkpoint-00000100/optimizer.safetensors"
            assert file.read_text() == "a hundred"
        build(folder)

    publish(other, make=goes_on)
    assert seen == ([] if damage else ["checkpoint-00000100"])
    assert _left(other) == []
    assert other.holds("merge", "f1")


def test_another_machine_goes_on_where_all_processes_of_a_step_were(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of two that train in shares was ahead when their machine was switched off."""
    monkeypatch.setattr(checkpoints, "_SECONDS", 3600.0)
    store = elsewhere(url, "first")

    def stopped(_: Path) -> None:
        for share, steps in (("share-1-of-2", (50, 100)), ("share-2-of-2", (50,))):
            folder = store.work_folder("merge", "f1") / share
            folder.mkdir()
            for step in steps:
                _checkpoint(folder, step, f"{step} of {share}")
        raise RuntimeError("the machine is gone")

    with pytest.raises(RuntimeError, match="is gone"):
        publish(store, make=stopped)
    other, seen = elsewhere(url), []

    def goes_on(folder: Path) -> None:
        work = other.work_folder("merge", "f1")
        seen.extend(file.relative_to(work).as_posix() for file in work.glob("share-*/*"))
        for share in ("share-1-of-2", "share-2-of-2"):
            file = work / share / "checkpoint-00000050/optimizer.safetensors"
            assert file.read_text() == f"50 of {share}"
        build(folder)

    publish(other, make=goes_on)
    assert sorted(seen) == [f"share-{share}-of-2/checkpoint-00000050" for share in (1, 2)]
    assert _left(other) == []


def test_with_another_number_of_processes_the_last_checkpoint_counts(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_SECONDS", 3600.0)

    def stopped(store: SharedStore, size: int, step: int) -> None:
        def work(_: Path) -> None:
            for rank in range(1, size + 1):
                folder = store.work_folder("merge", "f1") / f"share-{rank}-of-{size}"
                folder.mkdir()
                _checkpoint(folder, step, f"of {size}")
            raise RuntimeError("the machine is gone")

        with pytest.raises(RuntimeError, match="is gone"):
            publish(store, make=work)

    store = elsewhere(url, "first")
    stopped(store, 2, 500)
    stopped(store, 3, 50)
    assert {path.split("/")[1] for path in _left(store)} == {"checkpoint-00000050"}
    other, seen = elsewhere(url), []

    def goes_on(folder: Path) -> None:
        work = other.work_folder("merge", "f1")
        seen.extend(file.relative_to(work).as_posix() for file in work.glob("share-*/*"))
        build(folder)

    publish(other, make=goes_on)
    assert sorted(seen) == [f"share-{rank}-of-3/checkpoint-00000050" for rank in (1, 2, 3)]


@pytest.mark.parametrize("name", ["optimizer.safetensors", "../x", "/x", "checkpoint-1/../../x"])
def test_a_checkpoint_of_other_names_is_left_alone(name: str, url: str, elsewhere: Any) -> None:
    store, kept = elsewhere(url), []
    place = f"{url}/.checkpoints/merge-f1/checkpoint-00000100"
    store._objects.pipe_file(f"{place}/files.json", json.dumps({name: "0" * 64}).encode())

    def work(folder: Path) -> None:
        kept.extend(store.work_folder("merge", "f1").iterdir())
        build(folder)

    _checkpoint(store.work_folder("merge", "f1"), 50, "fifty")
    publish(store, make=work)
    assert [path.name for path in kept] == ["checkpoint-00000050"]


def test_a_store_that_takes_no_checkpoints_costs_no_step(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any) -> None:
        raise OSError("no checkpoint today")

    for name in ("_send", "_fetch"):
        monkeypatch.setattr(checkpoints.SharedCheckpoints, name, fails)
    store = elsewhere(url, "first")
    publish(store)
    assert store.holds("merge", "f1")
