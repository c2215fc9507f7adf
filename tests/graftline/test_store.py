"""The artifact store: what it keeps, what it refuses, how it names faults and damage."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save_file

import graftline
from graftline import manifest as manifest_module
from graftline.durable import StoreUnwritable, atomic_write_text
from graftline.errors import GraftlineError
from graftline.manifest import MANIFEST, CorruptArtifact
from graftline.store import Artifact, Store

PARAMETERS = {"rate": 1e-3, "order": ["image", "audio"], "replay": {"fraction": 0.1}}
PARENTS = {"backbone": "a1", "expert": "b2"}


def build(folder: Path) -> None:
    """Write what the tests' artifact holds: weights, and small files of equal size."""
    save_file(
        {"w": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "b": numpy.zeros(2, "float16")},
        folder / "model.safetensors",
    )
    (folder / "scores").mkdir()
    (folder / "scores" / "one.json").write_text('{"score": 1}')
    (folder / "scores" / "two.json").write_text('{"score": 2}')


def publish(store: Store, fingerprint: str = "f1", **changes: Any) -> Artifact:
    """Publish the tests' artifact."""
    arguments: dict[str, Any] = {
        "parameters": PARAMETERS,
        "parents": PARENTS,
        "code": "c0de",
        "build": build,
    }
    return store.publish("merge", fingerprint, **(arguments | changes))


def leftovers(root: Path) -> list[str]:
    """List temporary names, holders and work folders below a store."""
    found = [str(path.relative_to(root)) for path in root.rglob("*")]
    return [name for name in found if re.search(r"\.tmp-|\.holder$|^\.work/.", name)]


def no_build(_: Path) -> None:
    """Stand for a builder that must not run."""
    raise AssertionError("built although the artifact is there")


# --- round trip ------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["quick", "full"])
def test_round_trip(tmp_path: Path, verify: Any) -> None:
    store = Store(tmp_path / "artifacts", verify)
    assert store.find("merge", "f1") is None
    assert not store.root.exists(), "looking must not write"
    checkpoint = store.work_folder("merge", "f1") / "step-10.json"
    atomic_write_text(checkpoint, "{}")
    published = publish(store)
    assert published.folder == tmp_path / "artifacts" / "merge" / "f1"
    assert store.find("merge", "f1") == published == publish(store, build=no_build)
    manifest = published.manifest()
    assert manifest["files"]["scores/one.json"]["size"] == 12
    assert len(manifest["files"]["scores/one.json"]["sha256"]) == 64
    assert manifest["files"]["model.safetensors"]["tensors"] == {
        "b": {"dtype": "F16", "shape": [2]},
        "w": {"dtype": "F32", "shape": [2, 3]},
    }
    assert manifest["parents"] == PARENTS and manifest["parameters"] == PARAMETERS
    assert (manifest["kind"], manifest["fingerprint"], manifest["code"]) == ("merge", "f1", "c0de")
    assert leftovers(store.root) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_tensors_are_readable_for_whom_the_umask_says(
    tmp_path: Path, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        folder = publish(Store(tmp_path)).folder
    finally:
        os.umask(before)
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) == mode


def test_a_failing_build_leaves_nothing_and_its_error_passes(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        build(folder)
        raise KeyError("loss")

    store = Store(tmp_path)
    work = store.work_folder("merge", "f1")
    with pytest.raises(KeyError, match="loss"):
        publish(store, build=fail)
    assert store.find("merge", "f1") is None
    assert work.exists(), "resumable state must outlive a failure"
    assert leftovers(tmp_path) == [".work/merge-f1"]


@pytest.mark.parametrize("what", ["manifest", "link", "header", "short"])
def test_an_unusable_build_is_refused_with_its_path(tmp_path: Path, what: str) -> None:
    def wrong(folder: Path) -> None:
        if what == "manifest":
            (folder / MANIFEST).write_text("{}")
        elif what == "link":
            (folder / "link").symlink_to("/dev/zero")
        elif what == "header":
            (folder / "x.safetensors").write_bytes(b"\xff" * 20)
        else:
            save_file({"w": numpy.zeros(4)}, folder / "x.safetensors")
            os.truncate(folder / "x.safetensors", (folder / "x.safetensors").stat().st_size - 1)

    with pytest.raises(GraftlineError, match=r"manifest\.json|link|x\.safetensors"):
        publish(Store(tmp_path), build=wrong)
    assert leftovers(tmp_path) == []
    assert Store(tmp_path).find("merge", "f1") is None


def test_names_and_parameters_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for kind, fingerprint in [("../x", "f"), (".work", "f"), ("merge", "a/b"), ("merge", "")]:
        with pytest.raises(GraftlineError, match="use letters"):
            store.find(kind, fingerprint)
    for bad in [float("nan"), Path("x"), {1: 2}, {"deep": [object()]}]:
        with pytest.raises(GraftlineError, match=r"parameters\.key"):
            publish(store, parameters={"key": bad})
    with pytest.raises(GraftlineError, match="s3://bucket"):
        Store("s3://bucket/artifacts")


# --- a disk that is full or read-only --------------------------------------------------------


def fill_device(_: Path) -> None:
    """Meet a real full device."""
    with open("/dev/full", "wb") as file:
        file.write(b"x" * 100_000)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_disk_while_building(tmp_path: Path) -> None:
    with pytest.raises(StoreUnwritable, match=r"merge: .*No space left.* Free some space"):
        publish(Store(tmp_path), build=fill_device)
    assert leftovers(tmp_path) == []
    assert publish(Store(tmp_path)).manifest()


@pytest.mark.parametrize("function", ["fsync", "mkdir", "rename", "replace", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_disk_fault_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    original, calls, failed = getattr(os, function), 0, 0

    def faulty(path: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == deadly:
            filename = None if isinstance(path, int) else path
            raise OSError(code, os.strerror(code), filename)
        return original(path, *arguments, **named)

    for deadly in range(1, 100):
        calls = 0
        store = Store(tmp_path / str(deadly))
        monkeypatch.setattr(os, function, faulty)
        try:
            atomic_write_text(store.root / "note.txt", "1")
            publish(store)
        except StoreUnwritable as error:
            failed += 1
            assert str(store.root) in str(error) and os.strerror(code) in str(error)
        monkeypatch.undo()
        if calls < deadly:
            break
        assert leftovers(store.root) == []
        assert publish(store) == store.find("merge", "f1")
    assert failed > 0


LIMITED = """
import resource, sys
import numpy
from pathlib import Path
from safetensors.numpy import save_file
from graftline.durable import StoreUnwritable
from graftline.store import Store
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
def plain(folder): (folder / "big.bin").write_bytes(b"x" * 100_000)
def tensors(folder): save_file({"w": numpy.zeros(100_000)}, folder / "w.safetensors")
for name, build in [("plain", plain), ("tensors", tensors)]:
    try:
        Store(sys.argv[1]).publish(name, "f", parameters={}, parents={}, code="c", build=build)
    except StoreUnwritable as error:
        print(error)
"""


def test_a_real_limit_on_file_size(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(graftline.__file__).parents[1])}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    lines = subprocess.check_output(command, text=True, env=environment, timeout=60).splitlines()
    assert len(lines) == 2
    for line, kind in zip(lines, ["plain", "tensors"], strict=True):
        assert str(tmp_path / kind) in line and "File too large" in line
    assert leftovers(tmp_path) == []


def test_an_error_of_another_place_is_not_blamed_on_the_store(tmp_path: Path) -> None:
    def unreadable(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/elsewhere/weights.bin")

    with pytest.raises(PermissionError, match="elsewhere"):
        publish(Store(tmp_path / "artifacts"), build=unreadable)


@pytest.fixture
def read_only() -> Iterator[Path]:
    """Give a folder that this process cannot write, also when it is root's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "artifacts"
        publish(Store(folder))
        folder.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            yield folder
        finally:
            if root:
                os.seteuid(0)
            folder.chmod(0o755)


def test_read_only_folder(read_only: Path) -> None:
    store = Store(read_only)
    assert store.find("merge", "f1") == publish(store, build=no_build), "reading must still work"
    writes: list[Callable[[], object]] = [
        lambda: publish(store, "f2"),
        lambda: store.work_folder("merge", "f2"),
        lambda: atomic_write_text(store.root / "note.txt", "1"),
    ]
    for write in writes:
        with pytest.raises(
            StoreUnwritable, match=r"artifacts.*Permission denied.*Make it writable"
        ):
            write()
    assert store.sweep() == []


def test_an_unreadable_artifact_is_not_called_corrupt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    folder = publish(Store(tmp_path)).folder
    monkeypatch.setattr(manifest_module, "file_sha256", denied)
    with pytest.raises(GraftlineError, match=rf"{folder}/\S+: cannot be read.*readable") as caught:
        Store(tmp_path).find("merge", "f1")
    assert not isinstance(caught.value, CorruptArtifact)


def test_the_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("")
    with pytest.raises(StoreUnwritable, match="not a folder"):
        publish(Store(tmp_path / "artifacts"))


# --- damage ----------------------------------------------------------------------------------


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file, keeping its size."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def swap(folder: Path) -> None:
    """Exchange two files of the same size."""
    one, two, aside = folder / "scores/one.json", folder / "scores/two.json", folder / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)


def link_for_file(folder: Path) -> None:
    """Put a link where a file was."""
    (folder / "scores/one.json").unlink()
    (folder / "scores/one.json").symlink_to("two.json")


def change_manifest(folder: Path, key: str, value: object) -> None:
    """Put another value into a manifest, in good JSON."""
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


# name: (which file the message names, does the quick check see it, the damage)
DAMAGE: dict[str, tuple[str, bool, Callable[[Path], object]]] = {
    "flipped byte": ("scores/one.json", False, lambda f: flip(f / "scores/one.json")),
    "flipped tensor byte": ("model.safetensors", False, lambda f: flip(f / "model.safetensors")),
    "flipped header": ("model.safetensors", True, lambda f: flip(f / "model.safetensors", 9)),
    "truncated file": (
        "model.safetensors",
        True,
        lambda f: os.truncate(f / "model.safetensors", 9),
    ),
    "empty file": ("scores/two.json", True, lambda f: os.truncate(f / "scores/two.json", 0)),
    "grown file": ("scores/two.json", True, lambda f: os.truncate(f / "scores/two.json", 99)),
    "missing file": ("model.safetensors", True, lambda f: os.remove(f / "model.safetensors")),
    "foreign file": ("extra.bin", True, lambda f: (f / "extra.bin").write_text("")),
    "foreign link": ("link", True, lambda f: os.symlink("scores", f / "link")),
    "link for file": ("scores/one.json", True, link_for_file),
    "swapped files": ("scores/one.json", False, swap),
    "truncated manifest": (MANIFEST, True, lambda f: os.truncate(f / MANIFEST, 100)),
    "empty manifest": (MANIFEST, True, lambda f: os.truncate(f / MANIFEST, 0)),
    "missing manifest": (MANIFEST, True, lambda f: os.remove(f / MANIFEST)),
    "binary manifest": (MANIFEST, True, lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe\x00")),
    "list as manifest": (MANIFEST, True, lambda f: (f / MANIFEST).write_text("[]")),
    "changed parameters": (MANIFEST, True, lambda f: change_manifest(f, "parameters", {"rate": 1})),
    "NaN in manifest": (MANIFEST, True, lambda f: change_manifest(f, "parameters", float("nan"))),
    "later format": (MANIFEST, True, lambda f: change_manifest(f, "format", 99)),
}


@pytest.mark.parametrize("verify", ["quick", "full"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, damage: str, verify: Any) -> None:
    named, quick, harm = DAMAGE[damage]
    store = Store(tmp_path, verify)
    folder = publish(store).folder
    harm(folder)
    if verify == "quick" and not quick:
        assert store.find("merge", "f1") is not None
        return
    with pytest.raises(CorruptArtifact) as caught:
        store.find("merge", "f1")
    assert str(caught.value).startswith(f"{folder / named}: ")
    assert f"Delete the folder {folder} and run again" in str(caught.value)
    with pytest.raises(CorruptArtifact):
        publish(store)
    assert (folder / named).parent.exists(), "a corrupt artifact is evidence: leave it to the user"


def test_an_artifact_under_a_wrong_name_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store).folder.rename(tmp_path / "merge" / "f2")
    with pytest.raises(CorruptArtifact, match="belongs to merge/f1"):
        store.find("merge", "f2")


def test_hashes_are_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, hashed, original = Store(tmp_path), [], manifest_module.file_sha256

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return original(path)

    folder = publish(store).folder
    time.sleep(0.1)  # a file that changed just now is hashed again: time stamps are coarse
    monkeypatch.setattr(manifest_module, "file_sha256", counted)
    for _ in range(3):
        assert Store(tmp_path).find("merge", "f1") is not None
    assert sorted(hashed) == ["model.safetensors", "one.json", "two.json"]
    times = (folder / "scores/one.json").stat()
    flip(folder / "scores/one.json")
    os.utime(folder / "scores/one.json", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(CorruptArtifact, match=r"one\.json"):
        store.find("merge", "f1")
