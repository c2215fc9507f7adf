"""Writers of the artifact store: killed, racing, waiting; and atomic writes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import graftline
from graftline.durable import (
    StoreUnwritable,
    atomic_write_bytes,
    atomic_write_text,
    host_token,
    make_folder,
    publish_folder,
    temporary_sibling,
)
from graftline.manifest import MANIFEST, CorruptArtifact
from graftline.store import Artifact, Store

REPOSITORY = Path(graftline.__file__).parents[1]
KILLED = Path(__file__).with_name("killed_writer.py")
PARENTS = {"backbone": "a1", "expert": "b2"}


def build(folder: Path) -> None:
    """Build what the killed writers build."""
    (folder / "weights").mkdir()
    for name in ["weights/a.bin", "b.bin"]:
        (folder / name).write_bytes(b"0123456789")


def publish(store: Store, **changes: Any) -> Artifact:
    """Run the killed writers' publish."""
    step: dict[str, Any] = {"parameters": {}, "parents": {}, "code": "c", "build": build}
    return store.publish("merge", "f1", **(step | changes))


def leftovers(root: Path) -> list[str]:
    """List temporary names, holders and work folders below a store."""
    found = [str(path.relative_to(root)) for path in root.rglob("*")]
    return [name for name in found if re.search(r"\.tmp-|\.holder$|^\.work/.", name)]


def python(script: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a script in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, env=environment
    )


def no_build(_: Path) -> None:
    """Stand for a builder that must not run."""
    raise AssertionError("built although the artifact is there")


# --- killed at every boundary ----------------------------------------------------------------

# Every write that `killed_writer.py` does, in order. The last part is the file's name.
BOUNDARIES = [
    "mkdir:root",
    "fsync:stores",
    "mkdir:.locks",
    "fsync:root",
    "open:merge-f1.holder",
    "write:merge-f1.holder",
    "mkdir:.work",
    "fsync:root",
    "mkdir:merge-f1",
    "fsync:.work",
    "open:.tmp-state.json",
    "write:.tmp-state.json",
    "fsync:.tmp-state.json",
    "replace:.tmp-state.json",
    "fsync:merge-f1",
    "unlink:.tmp-state.json",
    "mkdir:merge",
    "fsync:root",
    "mkdir:.tmp-f1",
    "mkdir:weights",
    "open:a.bin",
    "write:a.bin",
    "open:b.bin",
    "write:b.bin",
    "fsync:a.bin",
    "fsync:weights",
    "fsync:b.bin",
    "fsync:.tmp-f1",
    "open:manifest.json",
    "write:manifest.json",
    "fsync:manifest.json",
    "fsync:.tmp-f1",
    "rename:.tmp-f1",
    "fsync:merge",
    "unlink:.tmp-f1",
    "rename:merge-f1",
    "unlink:state.json",
    "rmdir:.tmp-merge-f1",
    "unlink:merge-f1.holder",
]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Kill one writer at each boundary, each in a store of its own: `<folder>/<number>`."""
    folder = tmp_path_factory.mktemp("killed") / "stores"
    folder.mkdir()
    process = python(KILLED.read_text(), folder)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    return folder, json.loads(output)


def test_every_write_boundary_is_known(killed: tuple[Path, list[str]]) -> None:
    assert killed[1] == BOUNDARIES, "list a new write here, so that it is tested, too"
    assert (killed[0] / "0" / "merge" / "f1").is_dir()


@pytest.mark.parametrize(
    "number", range(1, len(BOUNDARIES) + 1), ids=[f"{n}-{b}" for n, b in enumerate(BOUNDARIES, 1)]
)
def test_killed_writer(killed: tuple[Path, list[str]], number: int) -> None:
    store = Store(killed[0] / str(number))
    rename = BOUNDARIES.index("rename:.tmp-f1") + 1
    before = store.find("merge", "f1")  # raises if it is neither whole nor absent
    assert (before is not None) == (number > rename)
    after = publish(store, build=no_build if before else build)
    assert {path.name for path in after.folder.rglob("*")} == {
        "weights",
        "a.bin",
        "b.bin",
        MANIFEST,
    }
    assert (after.folder / "weights" / "a.bin").read_bytes() == b"0123456789"
    store.sweep()
    with store.lock("merge", "f1"):
        pass  # who died while holding the lock left a note, which the next holder replaces
    assert leftovers(store.root) == []
    assert {path.name for path in store.root.iterdir()} <= {"merge", ".work", ".locks"}
    assert store.find("merge", "f1") == after


# --- several writers -------------------------------------------------------------------------

RACE = """
import os, sys, time
from pathlib import Path
from graftline.store import Store
def build(folder):
    Path(sys.argv[2], str(os.getpid())).touch()
    time.sleep(0.5)
    (folder / "who").write_text(str(os.getpid()))
print("ready", flush=True)
sys.stdin.readline()
artifact = Store(sys.argv[1]).publish(
    "merge", "f1", parameters={}, parents={}, code="c", build=build, on_wait=print)
print((artifact.folder / "who").read_text())
"""


def test_of_two_writers_one_builds_and_the_other_reuses(tmp_path: Path) -> None:
    built = tmp_path / "built"
    built.mkdir()
    processes = [python(RACE, tmp_path / "artifacts", built) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=30)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (builder,) = [path.name for path in built.iterdir()]
    assert [lines[-1] for lines in outputs] == [builder, builder]
    waited = [line for lines in outputs for line in lines[:-1]]
    assert len(waited) == 1
    assert waited[0].startswith(f"process {builder} on ")
    assert leftovers(tmp_path / "artifacts") == []


@pytest.mark.parametrize("theirs_is_whole", [True, False])
def test_a_writer_that_no_lock_holds_back_was_faster(tmp_path: Path, theirs_is_whole: bool) -> None:
    store = Store(tmp_path)

    def overtaken(folder: Path) -> None:
        build(folder)
        publish(Store(tmp_path / "other"))
        (tmp_path / "other" / "merge" / "f1").rename(tmp_path / "merge" / "f1")
        if not theirs_is_whole:
            (tmp_path / "merge" / "f1" / "b.bin").unlink()
        (folder / "ours").touch()

    if theirs_is_whole:
        assert not (publish(store, build=overtaken).folder / "ours").exists()
    else:
        with pytest.raises(CorruptArtifact, match=r"b\.bin: is missing"):
            publish(store, build=overtaken)
    assert leftovers(tmp_path) == []


HOLD = """
import os, sys, time
from graftline.store import Store
with Store(sys.argv[1]).lock("merge", "f1"):
    child = os.fork()  # a worker that outlives its parent must not keep the lock
    if child == 0:
        os.close(1)
        time.sleep(60)
        os._exit(0)
    print("held", child, flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_holder_is_taken_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder, texts = python(HOLD, tmp_path), []
    assert holder.stdout is not None
    held, child = holder.stdout.readline().split()
    assert held == "held"

    def kill(text: str) -> None:
        texts.append(text)
        holder.kill()
        holder.wait()

    start = time.monotonic()
    try:
        with Store(tmp_path).lock("merge", "f1", on_wait=kill):
            taken = time.monotonic() - start
            os.kill(int(child), 0)  # it still lives
    finally:
        os.kill(int(child), signal.SIGKILL)
    assert taken < 10
    assert len(texts) == 1
    assert re.fullmatch(rf"process {holder.pid} on \S+, since \S+", texts[0])
    assert "dead holder" in caplog.text
    assert leftovers(tmp_path) == []


def test_the_lock_is_reentrant_in_a_thread_and_excludes_others(tmp_path: Path) -> None:
    store, order = Store(tmp_path), []

    def second() -> None:
        with Store(tmp_path).lock("merge", "f1", on_wait=lambda _: waits.set(), poll_seconds=0.01):
            order.append("second")

    waits, thread = threading.Event(), threading.Thread(target=second)
    with store.lock("merge", "f1"), Store(tmp_path).lock("merge", "f1"):
        thread.start()
        assert waits.wait(10)
        publish(store)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_sweep_removes_only_what_dead_writers_of_this_host_left(tmp_path: Path) -> None:
    store, here = Store(tmp_path), host_token()
    kept_artifact = publish(store)
    state = store.work_folder("align", "f2") / "state.json"
    state.touch()
    dead = python("")
    dead.communicate(timeout=30)
    dead_names = [f".tmp-f1-{dead.pid}-{here}00000001", f".tmp-f1-{os.getpid()}-{here}00000002"]
    living = temporary_sibling(tmp_path / "merge" / "f3").name
    kept_names = [
        living,
        f".tmp-f1-{os.getppid()}-{here}00000003",
        f".tmp-f1-{dead.pid}-{'0' * 8}00000004",
        ".tmp-notes",
        "tmp",
    ]
    for name in dead_names + kept_names:
        (tmp_path / "merge" / name / "sub").mkdir(parents=True)
    unfinished = state.with_name(f".tmp-state.json-{dead.pid}-{here}00000005")
    unfinished.touch()
    expected = {tmp_path / "merge" / name for name in dead_names} | {unfinished}
    assert set(store.sweep()) == expected
    assert not any(path.exists() for path in expected)
    assert all((tmp_path / "merge" / name / "sub").exists() for name in kept_names)
    assert state.exists()
    assert store.find("merge", "f1") == kept_artifact
    assert store.sweep() == []


def test_sweep_leaves_what_a_writer_with_a_strange_process_id_is_filling(tmp_path: Path) -> None:
    """Of a container that has this one's name, but numbers its processes itself."""
    holder = python(HOLD, tmp_path)
    assert holder.stdout is not None
    _, child = holder.stdout.readline().split()
    dead = python("")
    dead.communicate(timeout=30)
    filling = tmp_path / "merge" / f".tmp-f1-{dead.pid}-{host_token()}00000001"
    filling.mkdir(parents=True)
    try:
        assert Store(tmp_path).sweep() == []
    finally:
        holder.kill()
        holder.communicate()
        os.kill(int(child), signal.SIGKILL)
    assert Store(tmp_path).sweep() == [filling]


def test_sweep_removes_work_folders_of_published_artifacts_only(tmp_path: Path) -> None:
    store = Store(tmp_path)
    names = ["fine-tune", "merge", "align", "realign"]
    folders = {}
    for kind in names:
        if kind != "align":
            folders[kind] = store.publish(
                kind, "f1", parameters={}, parents={}, code="c", build=build
            ).folder
        (store.work_folder(kind, "f1") / "state.json").touch()
    os.truncate(folders["realign"] / "b.bin", 1)
    holder = python(HOLD, tmp_path)
    assert holder.stdout is not None
    _, child = holder.stdout.readline().split()
    work = tmp_path / ".work"
    try:
        assert store.sweep() == [work / "fine-tune-f1"], "align is unfinished, merge is locked"
    finally:
        holder.kill()
        holder.communicate()
        os.kill(int(child), signal.SIGKILL)
    assert sorted(path.name for path in work.iterdir()) == ["align-f1", "merge-f1", "realign-f1"]
    assert store.sweep() == [work / "merge-f1"]
    assert all((work / f"{kind}-f1" / "state.json").exists() for kind in ["align", "realign"])
    assert store.find("fine-tune", "f1") is not None


def test_a_folder_that_another_process_makes_meanwhile_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = iter([False])  # the first look is from before the other process made it
    real = Path.is_dir
    monkeypatch.setattr(Path, "is_dir", lambda path: next(looks, None) is None and real(path))
    (tmp_path / "made").mkdir()
    make_folder(tmp_path / "made")
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnwritable, match="not a folder"):
        make_folder(tmp_path / "file")


def test_atomic_write_replaces_whole_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.txt"
    atomic_write_text(path, "é\n")
    atomic_write_bytes(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.txt"]


def test_publish_folder_does_not_replace(tmp_path: Path) -> None:
    target = tmp_path / "step-10"
    for number in range(2):
        temporary = temporary_sibling(target)
        temporary.mkdir()
        (temporary / "number").write_text(str(number))
        if number == 0:
            publish_folder(temporary, target)
        else:
            with pytest.raises(FileExistsError, match="step-10"):
                publish_folder(temporary, target)
    assert (target / "number").read_text() == "0"
