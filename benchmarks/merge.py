"""Merging checkpoints of 1.1B parameters: Graftline, the disk's floor and mergekit, in one run.

Makes a base and two experts with a Llama's shapes (bf16, seeded, several shards), then measures,
each from a cold page cache:

- the floor: reading the three checkpoints and writing one, in large pieces, with fsync;
- `graftline merge` for some rules, in a process of its own, with its peak anonymous memory;
- mergekit's `linear` and `ties`, if an interpreter that has mergekit 0.1.5 is given.

    python benchmarks/merge.py --size small
    python benchmarks/merge.py --mergekit /path/to/mergekit-venv/bin/python

Experts of `average` are all three checkpoints, those of the other rules the two beside the base,
so every tool reads the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from graftline.merging.writing import Stored, header, split

# vocabulary, width, feed-forward width, layers, width of keys and values
SIZES = {
    "small": (32000, 512, 1408, 6, 128),
    "large": (32000, 2048, 5632, 22, 256),
}
SHARDS = 5
PIECE = 16 << 20
MERGEKIT = "0.1.5"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--rules", default="average,ties", help="rules of ours, with commas")
    parser.add_argument("--rounds", type=int, default=2, help="each is measured this often")
    parser.add_argument("--mergekit", metavar="PYTHON", help="interpreter that has mergekit")
    parser.add_argument("--folder", type=Path, help="where the checkpoints go (default: temporary)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        results = measure(Path(name), arguments)
    text = json.dumps(results, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, object]:
    models = [folder / name for name in ("base", "first", "second")]
    for seed, model in enumerate(models):
        make(model, arguments.size, seed)
    parameters = sum(size for _, size in tensors(arguments.size))
    data = sum(path.stat().st_size for model in models for path in model.glob("*.safetensors"))
    say(f"{parameters / 1e9:.2f}B parameters, {data / 1e9:.2f} GB to read")
    seconds: dict[str, list[float]] = {}
    memory: dict[str, int] = {}
    for _ in range(arguments.rounds):
        seconds.setdefault("floor", []).append(floor(models, folder / "floor"))
        for rule in arguments.rules.split(","):
            took, anonymous = ours(rule, models, folder / "ours")
            seconds.setdefault(rule, []).append(took)
            memory[rule] = max(memory.get(rule, 0), anonymous)
    if arguments.mergekit:
        for rule in ("linear", "ties"):
            took, anonymous = theirs(arguments.mergekit, rule, models, folder / "theirs")
            seconds[f"mergekit {rule}"], memory[f"mergekit {rule}"] = [took], anonymous
    least = statistics.median(seconds["floor"])
    largest = 2 * max(size for _, size in tensors(arguments.size))
    return {
        "parameters": parameters,
        "bytes_read": data,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": 3 * largest + 300_000_000,
        "threads": torch.get_num_threads(),
        "seconds": {name: [round(took, 2) for took in tries] for name, tries in seconds.items()},
        "times_floor": {n: round(statistics.median(t) / least, 2) for n, t in seconds.items()},
        "peak_anonymous_bytes": memory,
    }


def tensors(size: str) -> Iterator[tuple[tuple[str, tuple[int, ...]], int]]:
    """Name and shape of each tensor, and its number of elements."""
    vocabulary, width, inner, layers, narrow = SIZES[size]
    shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        root = f"model.layers.{layer}."
        shapes[root + "input_layernorm.weight"] = (width,)
        for name, rows in (("q", width), ("k", narrow), ("v", narrow), ("o", width)):
            shapes[f"{root}self_attn.{name}_proj.weight"] = (rows, width)
        shapes[root + "post_attention_layernorm.weight"] = (width,)
        shapes[root + "mlp.gate_proj.weight"] = (inner, width)
        shapes[root + "mlp.up_proj.weight"] = (inner, width)
        shapes[root + "mlp.down_proj.weight"] = (width, inner)
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (vocabulary, width)
    for name, shape in shapes.items():
        yield (name, shape), int(np.prod(shape))


def make(folder: Path, size: str, seed: int) -> None:
    """Writes a checkpoint; seed 0 is the base, the others lie near it."""
    folder.mkdir()
    vocabulary, width, inner, layers, narrow = SIZES[size]
    heads = width // 64
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": narrow // 64,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    stored = [Stored(name, "BF16", shape, 2 * n) for (name, shape), n in tensors(size)]
    files = split(stored, sum(s.size for s in stored) // (SHARDS - 1), {"BF16": 2})
    places = {}
    for number, file in enumerate(files, 1):
        path = folder / f"model-{number:05d}-of-{len(files):05d}.safetensors"
        places.update({tensor.name: path.name for tensor in file})
        with open(path, "wb") as stream:
            stream.write(header(file, {"format": "pt"}))
            for tensor in file:
                values(tensor, seed).tofile(stream)
            stream.flush()
            os.fsync(stream.fileno())
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def values(tensor: Stored, seed: int) -> np.ndarray:
    """Normal weights of deviation 0.02; an expert's differ by 0.002."""
    place = int.from_bytes(tensor.name.encode()[-16:], "little") % (1 << 31)
    shape = (tensor.size // 2,)
    weights = np.random.default_rng([0, place]).standard_normal(shape, np.float32)
    weights *= 0.02
    if seed:
        move = np.random.default_rng([seed, place]).standard_normal(shape, np.float32)
        weights += 0.002 * move
    return torch.from_numpy(weights).bfloat16().view(torch.int16).numpy()


def forget(*folders: Path) -> None:
    """Drops the files' pages from the page cache."""
    os.sync()
    for path in (path for folder in folders for path in folder.glob("**/*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def floor(models: list[Path], target: Path) -> float:
    """Reads all models and writes the bytes of one, one thing after the other; seconds."""
    forget(*models)
    start = time.perf_counter()
    buffer = bytearray(PIECE)
    for path in (path for model in models for path in sorted(model.glob("*.safetensors"))):
        with open(path, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    left = sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    with open(target, "wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(memoryview(buffer)[: min(left, PIECE)])
        os.fsync(stream.fileno())
    took = time.perf_counter() - start
    target.unlink()
    say(f"floor: {took:.2f} s")
    return took


def ours(rule: str, models: list[Path], target: Path) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of `graftline merge`."""
    words = [sys.executable, "-m", "flows.cli", "merge", "--rule", rule]
    words += ["--base", str(models[0]), "--out", str(target)]
    for expert in models if rule == "average" else models[1:]:
        words += ["--expert", str(expert)]
    return timed(f"graftline {rule}", words, models, target)


def theirs(interpreter: str, rule: str, models: list[Path], target: Path) -> tuple[float, int]:
    """Seconds and peak anonymous bytes of mergekit."""
    found = subprocess.run(
        [interpreter, "-c", "import importlib.metadata as m; print(m.version('mergekit'))"],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout.strip()
    if found != MERGEKIT:
        say(f"mergekit is {found}; the numbers to compare with are of {MERGEKIT}")
    weight: dict[str, float] = {"weight": 1.0}
    if rule == "ties":
        weight["density"] = 0.2
    used = models if rule == "linear" else models[1:]
    recipe = {
        "merge_method": rule,
        "dtype": "bfloat16",
        "models": [{"model": str(model), "parameters": weight} for model in used],
    }
    if rule == "ties":
        recipe["base_model"] = str(models[0])
    file = target.with_suffix(".yaml")
    file.write_text(json.dumps(recipe))  # JSON is YAML
    code = "from mergekit.scripts.run_yaml import main; main()"
    words = [interpreter, "-c", code, str(file), str(target), "--lazy-unpickle"]
    return timed(f"mergekit {rule}", words, models, target)


def timed(name: str, words: list[str], models: list[Path], target: Path) -> tuple[float, int]:
    """Runs a command from a cold cache until its output is on the disk."""
    forget(*models)
    log = target.with_suffix(".log")
    start = time.perf_counter()
    with open(log, "w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process, peak))
        watcher.start()
        code = process.wait()
    os.sync()
    took = time.perf_counter() - start
    watcher.join()
    if code:
        raise SystemExit(f"{name} ended with {code}:\n{log.read_text()[-3000:]}")
    shutil.rmtree(target)
    say(f"{name}: {took:.2f} s, {peak[0] / 1e6:.0f} MB anonymous")
    return took, peak[0]


def watch(process: subprocess.Popen[bytes], peak: list[int]) -> None:
    """Keeps the largest RssAnon of a process, seen every 10 ms."""
    while process.poll() is None:
        try:
            with open(f"/proc/{process.pid}/status") as status:
                for line in status:
                    if line.startswith("RssAnon"):
                        peak[0] = max(peak[0], 1024 * int(line.split()[1]))
        except OSError:
            return
        time.sleep(0.01)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
