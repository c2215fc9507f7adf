"""LoRA adapters in PEFT's layout as experts: theta_0 + scale * B A, a checkpoint like any other.

Hu et al. 2021 (arXiv 2106.09685): beside a weight W stands the product of B (out x r) and A
(r x in), scaled by alpha / r, or by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732). Products are added
in float32 and stored so: rounding happens once, when the merge writes its result.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from graftline.durable import nearest
from graftline.errors import GraftlineError
from graftline.exchange.kinship import distance
from graftline.merging.checkpoints import DTYPES, INDEX, Checkpoint, open_checkpoint
from graftline.merging.writing import Stored, header
from graftline.weight_files import FLOAT_BYTES, Entry

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
_RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin an adapter that take its first product out of the base."""
_LISTED = 5
_PIECE = 16 << 20


@dataclass(frozen=True)
class Product:
    """What an adapter adds to one weight.

    Attributes:
        first: A, (r, in).
        second: B, (out, r).
        scale: what their product is multiplied with.
    """

    first: Tensor
    second: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the product."""
        return (self.second.shape[0], self.first.shape[1])

    def value(self) -> Tensor:
        """`scale * B A` in float32."""
        return self.scale * (self.second.float() @ self.first.float())


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's layout."""
    return (folder / CONFIG).is_file()


def write_expert(base: Path, adapter: Path, out: Path) -> None:
    """Writes the checkpoint that a base and an adapter stand for, a tensor at a time.

    Args:
        base: checkpoint folder of theta_0.
        adapter: PEFT's folder.
        out: folder to make.

    Raises:
        GraftlineError: lists everything that shows that the adapter is not this base's, or is of a
            kind that is no sum of low-rank products.
    """
    checkpoint = open_checkpoint(base)
    if checkpoint.problems:
        raise GraftlineError("\n".join(checkpoint.problems))
    products, problems = _products(adapter)
    problems += _misfits(products, checkpoint)
    problems += _other_base(checkpoint, adapter)
    shards: dict[Path, list[tuple[str, Entry]]] = {}
    for name, entry in checkpoint.entries.items():
        shards.setdefault(entry.file, []).append((name, entry))
    layouts = {shard: _layout(entries, products) for shard, entries in shards.items()}
    problems += _too_large(layouts.values(), out)
    if problems:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        raise GraftlineError(f"{adapter} is no expert of {base}:\n{listed}")
    out.mkdir(parents=True)
    for shard, layout in sorted(layouts.items()):
        _write_shard(out / shard.name, layout, checkpoint.entries, products)
        os.utime(out / shard.name, ns=_times(adapter))
    for name in ("config.json", "tokenizer.json", INDEX):
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


def _layout(entries: Sequence[tuple[str, Entry]], products: Mapping[str, Product]) -> list[Stored]:
    """A shard's tensors as the expert's has them: sums in float32, the widest dtypes first."""
    found = [
        Stored(name, "F32", entry.shape, 4 * entry.elements)
        if name in products
        else Stored(name, entry.dtype, entry.shape, entry.size)
        for name, entry in entries
    ]
    return sorted(found, key=lambda tensor: (-FLOAT_BYTES.get(tensor.dtype, 8), tensor.name))


def _too_large(layouts: Iterable[Sequence[Stored]], out: Path) -> list[str]:
    """A disk that the expert would fill; it lies beside the result until that is written."""
    needed = sum(tensor.size for layout in layouts for tensor in layout)
    place = nearest(out.absolute())
    free = shutil.disk_usage(place).free
    if free >= needed:
        return []
    return [f"{place}: has {free / 1e9:.1f} GB free, its float32 sums need {needed / 1e9:.1f} GB"]


def _write_shard(
    file: Path,
    layout: Sequence[Stored],
    entries: Mapping[str, Entry],
    products: Mapping[str, Product],
) -> None:
    with file.open("wb") as stream:
        stream.write(header(layout, {"format": "pt"}))
        for tensor in layout:
            entry = entries[tensor.name]
            if tensor.name in products:
                content = bytearray(entry.read(0, entry.size))
                weight = torch.frombuffer(content, dtype=DTYPES[entry.dtype]).view(entry.shape)
                total = weight.float() + products[tensor.name].value()
                stream.write(total.contiguous().numpy().data)
                continue
            for place in range(0, entry.size, _PIECE):
                stream.write(entry.read(place, _PIECE))


def _times(adapter: Path) -> tuple[int, int]:
    """Times of access and change that follow from an adapter's content alone.

    A merge tells its inputs apart by size and time: the same adapter is the same input.
    """
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    moment = int.from_bytes(digest.digest()[:7])  # nanoseconds: somewhere in two years
    return moment, moment


def _products(adapter: Path) -> tuple[dict[str, Product], list[str]]:
    """Weight's name in the base -> its product; and what is wrong with the adapter itself."""
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(adapter / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        return {}, [f"{CONFIG} and {WEIGHTS} cannot be read ({error})"]
    problems = _unsupported(config)
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name.removeprefix(_PREFIX))
        if found is None or tensor.dim() != 2:
            problems.append(f"{name} is no factor of a linear layer")
        elif not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds NaN or infinity")
        else:
            factors.setdefault(found["module"], {})[found["factor"]] = tensor
    products = {}
    for module, pair in sorted(factors.items()):
        if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            problems.append(f"{module}: its two factors do not belong together")
        else:
            scale = _scale(config, module, pair["A"].shape[0])
            products[f"{module}.weight"] = Product(pair["A"], pair["B"], scale)
    if not products and not problems:
        problems.append(f"{WEIGHTS} holds no products")
    return products, problems


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; only LORA is a sum of products")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_RESIDUAL):
        problems.append(
            f"init_lora_weights {start!r}: it belongs to a base that was changed when it was made; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("use_dora"):
        problems.append("use_dora: DoRA scales whole weights; fold it with merge_and_unload first")
    if config.get("bias", "none") != "none":
        problems.append(f"bias {config['bias']!r}: biases were trained; fold it first")
    if config.get("modules_to_save"):
        problems.append(f"modules_to_save {config['modules_to_save']}: whole modules were trained")
    if config.get("fan_in_fan_out"):
        problems.append("fan_in_fan_out: weights lie transposed; fold it first")
    return problems


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r, with the module's own alpha where a pattern names it, as PEFT matches patterns."""
    alpha = config.get("lora_alpha", rank)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _misfits(products: Mapping[str, Product], base: Checkpoint) -> list[str]:
    """Products whose weight the base lacks, or has in another shape."""
    absent = [name for name in products if name not in base.entries]
    wrong = [
        f"{name}: its product is {list(products[name].shape)}, the base's {list(entry.shape)}"
        for name, entry in _named(base, products)
        if entry.shape != products[name].shape
    ]
    wrong += [
        f"{name}: the base holds it as {entry.dtype}, to which nothing can be added"
        for name, entry in _named(base, products)
        if entry.dtype not in DTYPES
    ]
    problems = [f"{name}: the base has no such weight" for name in absent[:_LISTED]] + wrong[
        :_LISTED
    ]
    rest = len(absent) + len(wrong) - len(problems)
    return [*problems, f"{rest} more of this kind"] if rest > 0 else problems


def _named(base: Checkpoint, products: Mapping[str, Product]) -> list[tuple[str, Entry]]:
    return [(name, base.entries[name]) for name in products if name in base.entries]


def _other_base(base: Checkpoint, adapter: Path) -> list[str]:
    """Whether the base that the adapter names is here, and is another one."""
    try:
        config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # said already
    name = str(config.get("base_model_name_or_path") or "")
    named = next((p for p in (adapter / name, Path(name)) if name and p.is_dir()), None)
    if named is None or named.resolve() == base.folder.resolve():
        return []
    apart = distance(open_checkpoint(named).entries, base.entries)
    if apart == 0.0:
        return []
    measured = "no matrix of the same shape" if apart is None else f"{apart:.3f} of its norm away"
    return [f"it was trained on {name}, and the base given is not that: {measured}"]
