"""Weights of the user's own, from a hub or a folder: pinned, safetensors only, no foreign code.

A hub name is identified by its commit, a folder by the content of its files. A branch or a tag may
say something else tomorrow, and a pickle runs whatever it holds; both are refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graftline.durable import file_sha256
from graftline.errors import GraftlineError
from graftline.settings.models import Pretrained

TRUST_VARIABLE = "GRAFTLINE_TRUST_REMOTE_CODE"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_digests: dict[Path, tuple[tuple[int, int, int], str]] = {}


def pin_problem(source: Pretrained) -> str | None:
    """What is wrong with a hub name's revision; None if nothing is."""
    if source.name is None or _COMMIT.fullmatch(source.revision or ""):
        return None
    given = f"{source.revision!r} is no commit" if source.revision else "no revision is given"
    return (
        f"revision: {source.name} is not pinned ({given}). Write the 40 digits of the commit that "
        f"you mean; the hub shows them under History, and `git ls-remote "
        f"https://huggingface.co/{source.name} HEAD` prints today's"
    )


def check_trust(asked: bool) -> None:
    """Lets a model's own Python run only where recipe and environment both ask for it.

    Raises:
        GraftlineError: the recipe asks alone.
    """
    if asked and os.environ.get(TRUST_VARIABLE) != "1":
        raise GraftlineError(
            "trust_remote_code: the recipe asks to run Python that comes with the weights. Read "
            f"that code at the pinned revision first; then set {TRUST_VARIABLE}=1 for this run, or "
            "take trust_remote_code out"
        )


def identity(source: Pretrained, code: bool = False) -> dict[str, Any]:
    """What a plan records of weights: plain data that changes whenever they may have changed.

    Args:
        source: where they are.
        code: whether Python files beside the weights count too.

    Raises:
        GraftlineError: the folder is not there or has no safetensors weights.
    """
    if source.name is not None:
        return {"name": source.name, "revision": source.revision}
    folder = Path(str(source.folder))
    return {"folder": str(source.folder), "sha256": folder_digest(folder, code)}


def folder_of(recorded: Mapping[str, Any], code: bool = False) -> Path:
    """The local folder of what `identity` recorded; a hub's files are fetched once into its cache.

    Args:
        recorded: by `identity`.
        code: whether Python files are wanted too.

    Raises:
        GraftlineError: it is not pinned, cannot be fetched, has no safetensors weights, or is a
            folder that was changed since the run was planned.
    """
    if "folder" in recorded:
        folder = Path(recorded["folder"])
        if folder_digest(folder, code) != recorded["sha256"]:
            raise GraftlineError(f"{folder}: changed since the run was planned; run it again")
        return folder
    source = Pretrained(name=recorded["name"], revision=recorded["revision"])
    problem = pin_problem(source)
    if problem:
        raise GraftlineError(problem)
    folder = _fetch(str(source.name), str(source.revision), code)
    require_safetensors(folder, f"{source.name}@{str(source.revision)[:12]}")
    return folder


def _fetch(name: str, revision: str, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [*_COMPANIONS, "*.py"] if code else list(_COMPANIONS)
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub's client has errors of many libraries
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise GraftlineError(
            f"{name}@{revision[:12]}: cannot be fetched from the hub ({reason}). Check name, "
            "commit and connection; nothing is fetched unless you allow it with "
            "HF_HUB_OFFLINE=0 in front of the command; a gated model needs your token (HF_TOKEN). "
            "Or fetch it elsewhere and give the folder"
        ) from error


def require_safetensors(folder: Path, called: str | None = None) -> None:
    """Refuses weights that are pickles, or not there.

    Raises:
        GraftlineError: says how safetensors are got.
    """
    called = called or str(folder)
    if not (folder / "config.json").is_file():
        raise GraftlineError(f"{called}: no `transformers` model (config.json is missing)")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise GraftlineError(
            f"{called}: holds pickled weights only ({', '.join(pickles[:3])}), which may run code "
            "when they are read. Take a revision with safetensors (the hub's convert space opens a "
            "pull request whose commit can be pinned), or load it once where you trust it and "
            "call save_pretrained"
        )
    raise GraftlineError(
        f"{called}: holds no weights (*.safetensors). Where a hub has .bin files only, they are "
        "not fetched: take a revision with safetensors"
    )


def folder_digest(folder: Path, code: bool = False) -> str:
    """Digest of a model folder's files, by name and content; a file unchanged is read once.

    Raises:
        GraftlineError: the folder is not there or has no safetensors weights.
    """
    if not folder.is_dir():
        raise GraftlineError(f"{folder}: there is no such folder")
    require_safetensors(folder)
    lines = [f"{path.name} {file_digest(path)}" for path in model_files(folder, code)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def model_files(folder: Path, code: bool = False) -> list[Path]:
    """Files of a model folder that are read, sorted; whatever else lies there is not.

    Args:
        folder: the model's.
        code: whether Python files count too.
    """
    patterns = [*_COMPANIONS, "*.py"] if code else _COMPANIONS
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return sorted(path for path in found if path.is_file())


def file_digest(path: Path) -> str:
    """sha256 of a file, read again only if its size or times have changed.

    Raises:
        GraftlineError: it cannot be read.
    """
    try:
        status = path.stat()
        seen = (status.st_size, status.st_mtime_ns, status.st_ino)
        known = _digests.get(path.absolute())
        if known is None or known[0] != seen:
            known = _digests[path.absolute()] = (seen, file_sha256(path))
    except OSError as error:
        raise GraftlineError(f"{path}: cannot be read ({error.strerror})") from error
    return known[1]


def needs_remote_code(folder: Path) -> bool:
    """Whether a folder names Python of its own for its model (`auto_map`)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GraftlineError(f"{folder}/config.json: not readable ({error})") from error
    return isinstance(config, dict) and bool(config.get("auto_map"))
