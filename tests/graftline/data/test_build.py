"""The build is deterministic and atomic; its version is what DVC says it is."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftline.data import build as module
from graftline.data.build import (
    DEFAULT_SEED,
    build,
    checksums,
    directory_md5,
    record_files,
    verify,
)
from graftline.durable import host_token
from graftline.errors import GraftlineError


def test_same_seed_same_bytes_in_another_process(
    built: Path, tmp_path: Path, sizes: dict[str, int]
) -> None:
    code = "from pathlib import Path; from graftline.data.build import build; "
    code += f"build(Path('d'), {sizes})"
    environment = {**os.environ, "PYTHONHASHSEED": "77", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert checksums(tmp_path / "d") == checksums(built)
    assert len(checksums(built)) == 12


def test_another_seed_gives_other_bytes(
    built: Path, tmp_path: Path, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = {name: module.GENERATORS[name] for name in ("image", "point_cloud")}
    monkeypatch.setattr(module, "GENERATORS", kept)
    build(tmp_path / "data", sizes, seed=DEFAULT_SEED + 1)
    old, new = checksums(built), checksums(tmp_path / "data")
    assert len(new) == 6
    assert all(old[name] != md5 for name, md5 in new.items())


def test_failed_build_leaves_the_old_data(
    data: Path, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checksums(data)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", fail)
    with pytest.raises(GraftlineError, match="No space left"):
        build(data, sizes)
    assert checksums(data) == before
    assert [path.name for path in data.parent.iterdir()] == ["data"]


def test_build_replaces_and_reports(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GENERATORS", {"image": module.GENERATORS["image"]})
    seen: list[tuple[str, int, int]] = []
    build(data, {"test": 2}, progress=lambda *event: seen.append(event))
    assert list(checksums(data)) == ["image/test.parquet"]
    assert seen == [("build image", 0, 1), ("build", 1, 1)]
    assert [path.name for path in data.parent.iterdir()] == ["data"]


def test_leftovers_of_dead_builds_are_swept(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GENERATORS", {"image": module.GENERATORS["image"]})
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, living = (
        f".tmp-data-{pid}-{host_token()}01234567" for pid in (process.pid, os.getppid())
    )
    (data.parent / dead).mkdir()
    (data.parent / living).mkdir()
    build(data, {"test": 2})
    assert sorted(path.name for path in data.parent.iterdir()) == [living, "data"]


def test_a_file_in_the_folder_s_place_is_kept(tmp_path: Path, sizes: dict[str, int]) -> None:
    mine = tmp_path / "rows.parquet"
    mine.write_bytes(b"mine")
    with pytest.raises(GraftlineError, match="rows.parquet is a file"):
        build(mine, sizes)
    assert mine.read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("mine", "named"),
    [
        ("xray/train.parquet", "xray"),
        ("notes.txt", "notes.txt"),
        ("image/more.parquet", "image/more.parquet"),
        ("audio/train.parquet/part-0.parquet", "audio/train.parquet"),
    ],
)
def test_what_is_not_the_starter_s_is_kept(
    tmp_path: Path, sizes: dict[str, int], mine: str, named: str
) -> None:
    for name in ("data/image/test.parquet", f"data/{mine}"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(GraftlineError, match=f"data: holds {named}, which the starter does not"):
        build(tmp_path / "data", sizes)
    assert (tmp_path / "data" / mine).read_bytes() == b"mine"


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GraftlineError, match="'train' is 0"):
        build(tmp_path / "data", {"train": 0})
    assert list(tmp_path.iterdir()) == []


def dvc(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout


def test_version_is_what_dvc_says(data: Path) -> None:
    pytest.importorskip("dvc")
    for name in ("image-b/x", "image.b/é.txt", "image/Z", "z"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(name)
    root = data.parent
    dvc(root, "init", "--no-scm", "-q")
    dvc(root, "add", "-q", "data")
    assert f"md5: {directory_md5(data)}\n" in (root / "data.dvc").read_text()
    assert record_files(data, root / "data.dvc") == directory_md5(data)
    assert "up to date" in dvc(root, "status")
    assert verify(data, root / "data.dvc") == []
    (data / "z").unlink()
    dvc(root, "add", "-q", "data")
    assert "image.b/" in (root / "data.dvc").read_text()
    assert verify(data, root / "data.dvc") == []


def write_dvc_file(data: Path) -> Path:
    path = data.parent / "data.dvc"
    path.write_text(f"outs:\n- md5: {directory_md5(data)}\n  hash: md5\n  path: data\n")
    return path


def test_verify_names_each_file(data: Path) -> None:
    recorded = write_dvc_file(data)
    record_files(data, recorded)
    record_files(data, recorded)
    assert verify(data, recorded) == []
    changed = data / "image" / "test.parquet"
    changed.write_bytes(changed.read_bytes() + b"x")
    (data / "audio" / "test.parquet").unlink()
    (data / "notes.txt").write_text("surplus")
    lines = verify(data, recorded)
    assert [line.split(": ")[0] for line in lines] == [
        str(data / name) for name in ("audio/test.parquet", "image/test.parquet", "notes.txt")
    ]
    assert [line.split(": ")[1].split()[0] for line in lines] == ["missing", "differs", "too"]


def test_a_record_that_cannot_be_written_is_named(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = write_dvc_file(data)
    for number in (errno.EBUSY, errno.EACCES):

        def replace(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", replace)
            with pytest.raises(GraftlineError, match="cannot write .*data.dvc") as caught:
                record_files(data, recorded)
        assert os.strerror(number) in str(caught.value)
        assert "choose another folder" not in str(caught.value)


def test_verify_without_file_list_compares_the_whole(data: Path) -> None:
    recorded = write_dvc_file(data)
    assert verify(data, recorded) == []
    (data / "notes.txt").write_text("surplus")
    assert "differs as a whole" in verify(data, recorded)[0]
    with pytest.raises(GraftlineError, match="dvc add"):
        record_files(data, recorded)


@pytest.mark.parametrize("content", [None, "", "outs: []", "outs: [{path: data}]", "a: [", "- x"])
def test_unreadable_record_is_named(data: Path, content: str | None) -> None:
    recorded = data.parent / "data.dvc"
    if content is not None:
        recorded.write_text(content)
    with pytest.raises(GraftlineError, match=r"data\.dvc"):
        verify(data, recorded)


def test_missing_folder_is_named(data: Path, tmp_path: Path) -> None:
    with pytest.raises(GraftlineError, match="graftline data build"):
        verify(tmp_path / "absent", write_dvc_file(data))
