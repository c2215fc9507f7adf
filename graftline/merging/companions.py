"""What lies beside merged weights: tokenizer, configuration, model card, record of the merge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RECORD = "merge.json"
CARD = "README.md"
FORMAT = 1
_OURS = frozenset({RECORD, CARD, "manifest.json"})
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")


def companions_of(folder: Path) -> list[Path]:
    """The files of a checkpoint that are no weights: configuration, tokenizer, templates, code."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in _OURS
        and not path.name.endswith((*WEIGHTS, ".index.json"))
    ]


def copy_companions(source: Path, target: Path) -> None:
    """Copies a checkpoint's files other than weights; links are followed."""
    for path in companions_of(source):
        shutil.copyfile(path, target / path.name)


def read_record(folder: Path) -> dict[str, Any] | None:
    """The record of a finished merge; None where there is none that fits its files."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
        intact = all(
            (folder / name).stat().st_size == entry["size"]
            for name, entry in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(record) if intact and record.get("format") == FORMAT else None


def card(record: Mapping[str, Any], merged: int, kept: int) -> str:
    """The model card: what was merged, how, and how to repeat it."""
    request = record["request"]
    experts: Sequence[str] = request["experts"]
    words = ["graftline merge", f"--rule {request['rule']}", f"--base {request['base']}"]
    words += [f"--expert {expert}" for expert in experts]
    words += [f"--keep {prefix}={folder}" for prefix, folder in request["keep"].items()]
    words += [
        f"--set {key}={json.dumps(value)}" for key, value in sorted(request["parameters"].items())
    ]
    words += [f"--seed {request['seed']}", "--out DIR"]
    lines = [
        "---",
        "base_model:",
        *(f"- {json.dumps(Path(name).name)}" for name in (request["base"], *experts)),
        "library_name: transformers",
        "tags:",
        "- merge",
        "- graftline",
        "---",
        f"# Merged with {request['rule']}",
        "",
        f"{merged} tensors of {len(experts)} experts and their base were merged with the rule "
        f"`{request['rule']}` ({record['paper']}); {kept} are the base's own, bit by bit. Sums "
        "were gathered in float64 and rounded once.",
        "",
        "```sh",
        " \\\n  ".join(words),
        "```",
        "",
    ]
    if record["scales"]:
        lines += [
            "The weights here are shared by all experts. Expert `i` has its own: "
            "`base + scale * mask * (these - base)`, with the mask in "
            f"`masks/expert-<i>.safetensors` (one bit a parameter) and the scale in `{RECORD}`.",
            "",
        ]
    if record["warnings"]:
        lines += ["Warnings:", "", *(f"- {warning}" for warning in record["warnings"]), ""]
    return "\n".join(lines)
