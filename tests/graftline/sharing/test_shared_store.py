"""The store in an object store: whole or not there, whoever writes, whatever is damaged."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from graftline.errors import GraftlineError
from graftline.manifest import MANIFEST, CorruptArtifact
from graftline.sharing import claims
from graftline.sharing.copies import LIMIT_VARIABLE
from graftline.sharing.store import SharedStore, StoreUnreachable
from graftline.store import Artifact
from graftline.stores import machine_folder, open_store
from tests.graftline.stored import build, publish
from tests.object_store import BUCKET, KEYS

ROOT = Path(__file__).resolve().parents[3]


def no_build(_: Path) -> None:
    raise AssertionError("built although the artifact is there")


def objects(store: SharedStore, fingerprint: str = "f1") -> dict[str, str]:
    """Relative name -> full path of an artifact's objects."""
    place = f"{store.url}/merge/{fingerprint}".removeprefix("s3://")
    return {path.removeprefix(f"{place}/"): path for path in store._objects.find(place)}


def test_round_trip(url: str, elsewhere: Any) -> None:
    store = elsewhere(url, "first")
    assert store.find("merge", "f1") is None
    assert not store.holds("merge", "f1")
    work = store.work_folder("merge", "f1")
    published = publish(store)
    assert not work.exists()
    assert sorted(objects(store)) == [MANIFEST, *sorted(n for n in objects(store) if "/" in n)]
    assert len(objects(store)) == 3, "two files of the same content are one part"
    other = elsewhere(url)
    assert other.holds("merge", "f1")
    assert not other.folder("merge", "f1").exists(), "asking copies nothing"
    notes = other.notes("merge", "f1")
    assert (notes / "scores" / "one.json").read_text() == '{"score": 1}'
    assert not (notes / "model.safetensors").exists()
    found = publish(other, make=no_build)
    assert found.folder != published.folder
    assert found.manifest() == published.manifest()
    for name in published.manifest()["files"]:
        assert (found.folder / name).read_bytes() == (published.folder / name).read_bytes()
    assert other.local("merge", "f1") == other.notes("merge", "f1") == found.folder
    assert other.location("merge", "f1") == f"{url}/merge/f1"
    assert machine_folder(url) == other.root
    assert not list(other.root.rglob(".tmp-*"))


@pytest.mark.parametrize("part", ["flipped", "deleted", "cut off", "manifest", "manifest changed"])
def test_damage_is_named_and_never_used(url: str, elsewhere: Any, part: str) -> None:
    store = elsewhere(url, "first")
    publish(store)
    files, found = store._objects, objects(store)
    manifest = json.loads(files.cat_file(found[MANIFEST]))
    damaged = found[f"parts/{manifest['files']['model.safetensors']['sha256']}"]
    content = files.cat_file(damaged)
    if part == "deleted":
        files.rm_file(damaged)
    elif part == "flipped":
        files.pipe_file(damaged, content[:-1] + bytes([content[-1] ^ 1]))
    elif part == "cut off":
        files.pipe_file(damaged, content[:-1])
    elif part == "manifest":
        damaged = found[MANIFEST]
        files.pipe_file(damaged, files.cat_file(damaged)[:-9])
    else:
        damaged = found[MANIFEST]
        files.pipe_file(damaged, files.cat_file(damaged).replace(b"0.1", b"0.2"))
    other = elsewhere(url)
    with pytest.raises(CorruptArtifact) as raised:
        publish(other, make=no_build)
    assert f"s3://{damaged}" in str(raised.value)
    assert f"Delete the folder {url}/merge/f1" in str(raised.value)
    assert not other.folder("merge", "f1").exists()
    for path in found.values():
        if files.exists(path):
            files.rm_file(path)
    assert publish(other).manifest()["files"] == manifest["files"], "rebuilt after what it says"


def test_a_damaged_copy_is_fetched_again(url: str, elsewhere: Any) -> None:
    store = elsewhere(url)
    folder = publish(store).folder
    (folder / "scores" / "one.json").write_text('{"score": 9}')
    assert (elsewhere(url).find("merge", "f1").folder / "scores" / "one.json").read_text() == (
        '{"score": 1}'
    )


def test_a_writer_killed_anywhere_leaves_all_or_nothing(
    url: str, elsewhere: Any, tmp_path: Path
) -> None:
    boundaries = 6  # before and after two parts and the manifest
    script = Path(__file__).with_name("killed_sender.py")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(script), url, str(tmp_path / "killed"), str(boundaries)],
        env=environment,
        check=True,
    )
    other = elsewhere(url)
    seen = [other.holds("merge", f"f{number}") for number in range(1, boundaries + 1)]
    assert seen == [False, False, False, False, False, True]
    again = elsewhere(url, "killed/3")
    built = again.publish("merge", "f3", parameters={}, parents={}, code="c", build=no_build)
    assert (built.folder / "b.bin").read_bytes() == b"abc", "what was built is not built again"
    assert sorted(f.name for f in other.find("merge", "f3").folder.iterdir() if f.is_file()) == [
        "b.bin",
        MANIFEST,
    ]


def test_two_machines_publish_the_same_at_once(
    url: str,
    elsewhere: Any,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(claims, "_LEASE_SECONDS", 0.0)  # claims save work, guard nothing
    stores = [elsewhere(url, name) for name in ("one", "two")]
    barrier = threading.Barrier(2)
    found: list[Artifact] = []

    def work(number: int) -> None:
        def make(folder: Path) -> None:
            build(folder)
            (folder / "timing.json").write_text(json.dumps({"seconds": number}))
            barrier.wait()

        found.append(publish(stores[number], make=make))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    one, two = (artifact.manifest() for artifact in found)
    assert one == two, "the first manifest wins, and the other machine takes it over"
    assert sum("published it first" in text for text in caplog.messages) == 1
    assert elsewhere(url).find("merge", "f1").manifest() == one


def test_a_machine_waits_for_what_another_one_computes(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(claims, "_RENEWAL_SECONDS", 0.1)
    monkeypatch.setattr(claims, "_LEASE_SECONDS", 1.0)
    first, second = elsewhere(url, "one"), elsewhere(url, "two")
    begun, waited = threading.Event(), threading.Event()

    def make(folder: Path) -> None:
        begun.set()
        assert waited.wait(30)
        build(folder)

    thread = threading.Thread(target=publish, args=(first, "f1", make))
    thread.start()
    assert begun.wait(30)
    found: list[Artifact] = []
    other = threading.Thread(target=lambda: found.append(publish(second, make=no_build)))
    other.start()
    time.sleep(1.5)  # longer than an unrenewed claim lasts
    assert other.is_alive() and not found
    waited.set()
    thread.join(30)
    other.join(30)
    assert [artifact.fingerprint for artifact in found] == ["f1"]
    assert not first._objects.find(f"{url}/.claims"), "no claim stays"


@pytest.mark.parametrize(
    "holder", ["of this host", "of another host", "of a container of this name", "unreadable"]
)
def test_a_dead_machines_claim_is_taken_over(
    url: str, elsewhere: Any, holder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "_LOOK_SECONDS", 0.05)
    if holder != "of this host":
        monkeypatch.setattr(claims, "_LEASE_SECONDS", 0.5)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    there = {**claims._HERE}
    there |= {"host": "00000000"} if holder == "of another host" else {}
    there |= {"processes": "pid:[1]"} if holder == "of a container of this name" else {}
    claim = json.dumps({**there, "pid": ended.pid, "key": "k", "renewals": 3})
    assert claims._is_dead(claim.encode()) == (holder in ("of this host", "unreadable"))
    store = elsewhere(url, "one")
    content = b"{" if holder == "unreadable" else claim.encode()
    store._objects.pipe_file(f"{url}/.claims/merge-f1", content)
    started = time.monotonic()
    publish(store)
    assert store.holds("merge", "f1") and time.monotonic() - started < 30
    assert not store._objects.find(f"{url}/.claims")


def test_a_failed_step_gives_its_claim_back(url: str, elsewhere: Any) -> None:
    store = elsewhere(url, "one")

    def fails(_: Path) -> None:
        assert len(store._objects.find(f"{url}/.claims")) == 1
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        publish(store, make=fails)
    assert not store._objects.find(f"{url}/.claims")


def test_a_store_that_takes_no_claims_costs_no_step(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, mode: str = "") -> None:
        raise OSError("no claim today")

    monkeypatch.setattr(claims.SharedClaim, "_write", fails)
    store = elsewhere(url, "first")
    publish(store)
    assert store.holds("merge", "f1")


def test_copies_above_the_limit_go_unless_they_are_used(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = elsewhere(url)
    kept = publish(store, "f1")
    folders = [publish(store, name).folder for name in ("f2", "f3")]
    monkeypatch.setenv(LIMIT_VARIABLE, "0.000001")
    assert store.sweep() == [], "just used"
    for mark in (store.root / ".used").iterdir():
        os.utime(mark, (1, 1))
    assert sorted(store.sweep()) == sorted(folders), "the one that is held stays"
    assert kept.folder.exists()
    assert store.find("merge", "f2") is not None, "it is fetched when it is wanted"


def test_some_files_of_artifacts_count_and_go_too(
    url: str, elsewhere: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(elsewhere(url, "first"))
    store = elsewhere(url)
    some = store.notes("merge", "f1")
    assert some.parent.name == ".notes"
    monkeypatch.setenv(LIMIT_VARIABLE, "0.0000001")
    assert store.sweep() == [], "just read"
    os.utime(some, (1, 1))
    assert store.notes("merge", "f1") == some and store.sweep() == [], "read again"
    os.utime(some, (1, 1))
    assert store.sweep() == [some] and not some.exists()
    assert store.notes("merge", "f1").exists(), "it is fetched when it is wanted"


def test_trouble_is_named(
    url: str, monkeypatch: pytest.MonkeyPatch, server: dict[str, str]
) -> None:
    with pytest.raises(GraftlineError, match="Make the bucket first"):
        publish(open_store("s3://no-such-bucket/x"))
    for wrong in ("file:///tmp/x", "http://host/x"):
        with pytest.raises(GraftlineError, match="cannot be there"):
            open_store(wrong)
    with pytest.raises(GraftlineError, match="holds credentials"):
        open_store("s3://id:half/other-half@lab/x")
    with pytest.raises(GraftlineError, match="holds credentials") as raised:
        open_store(f"s3://id:{KEYS['AWS_SECRET_ACCESS_KEY']}@{BUCKET}/x")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(raised.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StoreUnreachable, match="run again") as unreachable:
        open_store(url).find("merge", "f1")
    assert KEYS["AWS_SECRET_ACCESS_KEY"] not in str(unreachable.value)
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_url_with_one_slash_is_no_folder(tmp_path: Path) -> None:
    for ask in (open_store, machine_folder):
        with pytest.raises(GraftlineError, match="lacks a slash; write s3://bucket/") as raised:
            ask("s3:/id:secret@lab/x")
        assert "secret" not in str(raised.value)
    assert open_store(tmp_path / "s3:" / "x").root == tmp_path / "s3:" / "x"


def test_who_needs_a_connector_copies_no_backbone(url: str, elsewhere: Any) -> None:
    def fill(folder: Path) -> None:
        build(folder)
        (folder / "connector-image.json").write_text("{}")

    publish(elsewhere(url, "first"), make=fill)
    store = elsewhere(url)
    for _ in range(2):  # copied, then found here
        found = store.find_files("merge", "f1", "connector-")
        assert found is not None
        files = sorted(file.name for file in found.folder.rglob("*") if file.is_file())
        assert files == ["connector-image.json", "manifest.json"]
    (found.folder / "connector-image.json").write_text("[]")
    found = store.find_files("merge", "f1", "connector-")
    assert (found.folder / "connector-image.json").read_text() == "{}", "copied again"
    assert store.find_files("merge", "f2", "connector-") is None
    store._objects.rm(f"{url}/merge/f1", recursive=True)
    assert store.find_files("merge", "f1", "connector-") is None, "it is to be made anew"
    publish(elsewhere(url, "first"), make=fill)
    store = elsewhere(url)
    whole = store.find("merge", "f1")
    assert (whole.folder / "model.safetensors").exists()
    assert store.find_files("merge", "f1", "connector-").folder == whole.folder
