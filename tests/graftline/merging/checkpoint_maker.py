"""Small checkpoints for the tests of streaming, and a script that is killed while it merges."""

from __future__ import annotations

import builtins
import io
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {
    "model.embed_tokens.weight": (60, 16),
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.mlp.up_proj.weight": (700, 130),
    "model.layers.1.mlp.up_proj.weight": (40, 16),
    "model.norm.weight": (16,),
    "lm_head.weight": (60, 16),
}
CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 60}
VOCABULARY = {f"token{n}": n for n in range(60)}


def weights(
    seed: int, dtype: torch.dtype = torch.bfloat16, base: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """A model's weights; near those of a base if one is given."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if base is None:
        return {name: (0.02 * values).to(dtype) for name, values in noise.items()}
    return {n: (base[n].float() + 0.004 * values).to(dtype) for n, values in noise.items()}


def write(
    folder: Path, tensors: dict[str, Tensor], shards: int = 1, config: dict[str, Any] | None = None
) -> Path:
    """Writes a checkpoint folder with configuration and tokenizer."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    tokenizer = {"model": {"type": "BPE", "vocab": VOCABULARY}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        places.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def trio(folder: Path) -> tuple[Path, list[Path]]:
    """A base and two experts, sharded differently."""
    start = weights(0)
    base = write(folder / "base", start, shards=2)
    experts = [write(folder / f"e{n}", weights(n, base=start), shards=n) for n in (1, 3)]
    return base, experts


class Boundaries:
    """Counts what a merge does to the disk and kills the process in the n-th of it."""

    def __init__(self) -> None:
        self.count = self.deadly = 0

    def reach(self) -> None:
        """One boundary."""
        self.count += 1
        if self.count == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self) -> None:
        """Puts a boundary before every change of the disk."""
        for name in ("mkdir", "fsync", "fdatasync", "rename", "unlink"):
            setattr(os, name, self._watched(getattr(os, name)))
        real: Any = io.open

        def watched_open(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if not set(mode) & set("wxa"):
                return real(path, mode, *rest, **named)
            self.reach()
            return _Halved(real(path, mode, *rest, **named), self)

        builtins.open = io.open = watched_open  # type: ignore[assignment]

    def _watched(self, original: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            self.reach()
            return original(*arguments, **named)

        return call


class _Halved:
    """A file whose deadly write leaves half of its content."""

    def __init__(self, file: Any, boundaries: Boundaries) -> None:
        self._file, self._boundaries = file, boundaries

    def __enter__(self) -> _Halved:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: Any) -> Any:
        """Half, the boundary, and the rest."""
        view = memoryview(content).cast("B")
        if self._boundaries.count + 1 == self._boundaries.deadly:
            self._file.write(view[: len(view) // 2])
            self._file.flush()
        self._boundaries.reach()
        return self._file.write(content)


def main(folder: Path, seed: int, tries: int) -> None:
    """Merges once to count the boundaries, then forks mergers that die at some of them."""
    import random

    from graftline.merging.streaming import MergeRequest, merge_checkpoints

    torch.set_num_threads(1)
    base, experts = folder / "base", (folder / "e1", folder / "e3")
    boundaries = Boundaries()
    boundaries.watch()

    def run(name: str) -> None:
        merge_checkpoints(MergeRequest("mmer", base, experts, folder / name, shard_bytes=100_000))

    run("whole")
    total = boundaries.count
    chosen = sorted({1, total, *random.Random(seed).sample(range(1, total + 1), tries)})
    for number in chosen:
        child = os.fork()
        if child == 0:
            boundaries.count, boundaries.deadly = 0, number
            run(f"killed-{number}")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (number, status)
    print(json.dumps(chosen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
