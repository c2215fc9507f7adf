"""What lies in a Hugging Face checkpoint folder: names, dtypes, shapes and places of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from graftline.weight_files import Entry, Origin, read_header

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""safetensors' names of the dtypes that can be merged."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder.

    Attributes:
        folder: as given.
        entries: tensor name -> where it lies.
        config: the content of config.json; empty without one.
        problems: all that is wrong with the files, for people.
    """

    folder: Path
    entries: Mapping[str, Entry]
    config: Mapping[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    @property
    def tied(self) -> bool:
        """Whether the configuration shares input and output embeddings."""
        text = self.config.get("text_config")
        inner = text.get("tie_word_embeddings") if isinstance(text, dict) else None
        return bool(self.config.get("tie_word_embeddings", inner))

    def identity(self) -> dict[str, list[int | str]]:
        """Size and time of change of each weight file, to tell inputs apart without hashing."""
        files = {entry.file: entry.origin for entry in self.entries.values()}
        found: dict[str, list[int | str]] = {}
        for file, origin in sorted(files.items()):
            if origin is not None:
                found[file.name] = [origin.size, origin.identity()]
            else:
                state = file.stat()
                found[file.name] = [state.st_size, state.st_mtime_ns]
        return found


def open_checkpoint(folder: Path, origins: Mapping[str, Origin] | None = None) -> Checkpoint:
    """Reads the headers of a folder's safetensors files, one file or shards with an index.

    Nothing is raised: all that is wrong stands in the result's `problems`.

    Args:
        folder: a checkpoint.
        origins: file name -> where its content is, of those that are here by name alone.
    """
    if not folder.is_dir():
        return Checkpoint(folder, {}, problems=(f"{folder}: no such folder",))
    problems: list[str] = []
    weight_map, shards = _shards(folder, problems)
    entries: dict[str, Entry] = {}
    whole: set[str] = set()
    for shard in shards:
        try:
            found = read_header(shard, (origins or {}).get(shard.name))
        except (OSError, ValueError) as error:
            problems.append(f"{shard}: {error}; copy or download it again")
            continue
        whole.add(shard.name)
        twice = sorted(found.keys() & entries.keys())
        problems += [f"{shard}: {name} is in {entries[name].file.name}, too" for name in twice]
        unlisted = sorted(found.keys() - weight_map.keys()) if weight_map else []
        problems += [f"{shard}: {name} is not in {INDEX}" for name in unlisted]
        entries.update(found)
    for name, shard_name in sorted(weight_map.items()):
        if shard_name in whole and name not in entries:
            problems.append(f"{folder / shard_name}: lacks {name}, which {INDEX} places there")
    return Checkpoint(folder, entries, _config(folder, problems), tuple(problems))


def _shards(folder: Path, problems: list[str]) -> tuple[dict[str, str], list[Path]]:
    """The index's map (empty without one) and the files to read."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if single.exists():
            return {}, [single]
        others = sorted(folder.glob("*.safetensors"))
        if len(others) == 1:
            return {}, others
        pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLED]
        if others:
            problems.append(f"{folder}: {len(others)} safetensors files but no {INDEX}")
        elif pickled:
            problems.append(
                f"{folder}: {', '.join(pickled)} are pickles, which are not read; save the model "
                "again with save_pretrained, which writes safetensors"
            )
        else:
            problems.append(f"{folder}: neither {SINGLE} nor {INDEX}")
        return {}, []
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        names = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problems.append(f"{index}: is no index of shards ({error!r})")
        return {}, []
    shards = []
    for shard in sorted(set(names.values())):
        if Path(shard).name != shard:
            problems.append(f"{index}: names {shard!r}, which is no file beside it")
        elif not (folder / shard).is_file():
            problems.append(f"{folder / shard}: is missing, {INDEX} names it")
        else:
            shards.append(folder / shard)
    return names, shards


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        problems.append(f"{path}: cannot be read as JSON ({error})")
        return {}
    return config if isinstance(config, dict) else {}


def vocabulary(folder: Path) -> dict[str, int] | None:
    """Token -> id of a folder's tokenizer.json; None without a readable one."""
    try:
        content = json.loads((folder / "tokenizer.json").read_bytes())
        tokens = content["model"]["vocab"]
        if isinstance(tokens, list):  # unigram: a list of (token, score)
            known = {str(pair[0]): place for place, pair in enumerate(tokens)}
        else:
            known = {str(token): int(number) for token, number in tokens.items()}
        for token in content.get("added_tokens", []):
            known[str(token["content"])] = int(token["id"])
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None
    return known
