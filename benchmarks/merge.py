"""Merging checkpoints of 1.1B parameters: Graftline, the disk's floor and mergekit, in one run.

Makes a base and two experts with a Llama's shapes (bf16, seeded, several shards), then measures,
each from a cold page cache:

- the floor: reading the three checkpoints and writing one, in large pieces, with fsync;
- `graftline merge` for some rules, in a process of its own: wall and processor seconds, and its
  peak anonymous memory, also with eight experts (the same folders again and again);
- mergekit's `linear` and `ties`, if an interpreter that has mergekit 0.1.5 is given.

Floor and merges take turns, and the load of the machine is noted, because others may use it, too.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from graftline.merging.writing import Stored, header, split

# vocabulary, width, feed-forward width, layers, width of keys and values
SIZES = {
    "small": (32000, 512, 1408, 6, 128),
    "medium": (32000, 1024, 2816, 8, 256),
    "large": (32000, 2048, 5632, 22, 256),
}
SHARDS = 5
PIECE = 16 << 20
MERGEKIT = "0.1.5"
RIVALS = {"linear": "average", "ties": "ties"}  # mergekit's rules, and what ours are called
MANY = 8  # experts, when memory is looked at


@dataclass(frozen=True)
class Run:
    """What one run took: wall seconds, processor seconds (user + system), peak anonymous bytes."""

    seconds: float
    processor: float
    anonymous: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--rules", default="average,ties", help="rules of ours, with commas")
    parser.add_argument("--rounds", type=int, default=2, help="each is measured this often")
    parser.add_argument("--many", action="store_true", help=f"memory with {MANY} experts, too")
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
    load = os.getloadavg()[0]
    runs: dict[str, list[Run]] = {}
    for _ in range(arguments.rounds):
        for rule in arguments.rules.split(","):
            runs.setdefault("floor", []).append(floor(models, folder / "floor"))
            runs.setdefault(rule, []).append(ours(rule, models, folder / "ours"))
    many = {}
    if arguments.many:
        for rule in arguments.rules.split(","):
            experts = [models[1 + place % 2] for place in range(MANY)]
            many[rule] = ours(rule, [models[0], *experts], folder / "ours").anonymous
    if arguments.mergekit:
        for rule in RIVALS:
            found = theirs(arguments.mergekit, rule, models, folder / "theirs")
            runs[f"mergekit {rule}"] = [found]
    seconds = {
        name: statistics.median(run.seconds for run in tries) for name, tries in runs.items()
    }
    largest = 2 * max(size for _, size in tensors(arguments.size))
    return {
        "parameters": parameters,
        "bytes_read": data,
        "largest_tensor_bytes": largest,
        "memory_bound_bytes": 3 * largest + 300_000_000,
        "threads": torch.get_num_threads(),
        "load_before": load,
        "seconds": {name: [round(run.seconds, 2) for run in tries] for name, tries in runs.items()},
        "processor_seconds": {
            name: [round(run.processor, 2) for run in tries] for name, tries in runs.items()
        },
        "times_floor": {name: round(took / seconds["floor"], 2) for name, took in seconds.items()},
        "times_mergekit": {
            rule: round(seconds[rule] / seconds[f"mergekit {rival}"], 3)
            for rival, rule in RIVALS.items()
            if arguments.mergekit and rule in seconds
        },
        "peak_anonymous_bytes": {
            name: max(run.anonymous for run in tries)
            for name, tries in runs.items()
            if name != "floor"
        },
        f"peak_anonymous_bytes_{MANY}_experts": many,
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


def floor(models: list[Path], target: Path) -> Run:
    """Reads all models and writes the bytes of one, one thing after the other."""
    forget(*models)
    start, before = time.perf_counter(), time.process_time()
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
    run = Run(time.perf_counter() - start, time.process_time() - before)
    target.unlink()
    say(f"floor: {run.seconds:.2f} s, {run.processor:.2f} s of processor")
    return run


def ours(rule: str, models: list[Path], target: Path) -> Run:
    """`graftline merge`."""
    words = [sys.executable, "-m", "flows.cli", "merge", "--rule", rule]
    words += ["--base", str(models[0]), "--out", str(target)]
    experts = models if rule == "average" else models[1:]
    for expert in experts:
        words += ["--expert", str(expert)]
    return timed(f"graftline {rule}, {len(experts)} experts", words, models, target)


def theirs(interpreter: str, rule: str, models: list[Path], target: Path) -> Run:
    """mergekit."""
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


def timed(name: str, words: list[str], models: list[Path], target: Path) -> Run:
    """Runs a command from a cold cache until its output is on the disk."""
    forget(*models)
    log = target.with_suffix(".log")
    start, before = time.perf_counter(), os.times()
    with open(log, "w") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT)
        peak = [0]
        watcher = threading.Thread(target=watch, args=(process, peak))
        watcher.start()
        code = process.wait()
    os.sync()
    took, after = time.perf_counter() - start, os.times()
    watcher.join()
    if code:
        raise SystemExit(f"{name} ended with {code}:\n{log.read_text()[-3000:]}")
    shutil.rmtree(target)
    processor = sum(after[2:4]) - sum(before[2:4])  # of children: user and system
    say(f"{name}: {took:.2f} s, {processor:.2f} s of processor, {peak[0] / 1e6:.0f} MB anonymous")
    return Run(took, processor, peak[0])


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
