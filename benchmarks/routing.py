"""Prefill of a mixed four-modality batch: routed weights beside the dense model, in one run.

Every prompt holds one medium of each of four modalities and a question. Weights are made up
(timing does not depend on them); both sides see the same embeddings and fill a KV cache. Rounds
alternate and the best of each is kept, since other processes only ever slow a round down.

    python benchmarks/routing.py artifacts/backbone/<fingerprint>/backbone --batch 1 16 200
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from graftline.model.opening import open_backbone
from graftline.model.routing import (
    DenseWeight,
    LowRankWeight,
    MaskedWeight,
    routable_parameters,
    route_backbone,
    routed,
    unroute_backbone,
)

MODALITIES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", type=Path, help="folder of a causal LM")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 200])
    parser.add_argument("--tokens", type=int, default=4, help="of one medium")
    parser.add_argument("--text", type=int, default=24, help="text tokens of a prompt")
    parser.add_argument("--rank", type=int, default=16, help="of the low-rank variants")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--words", choices=["merged", "modality"], default="modality",
                        help="what text meets, as `compose.text`")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", nargs="+", default=["masked", "cached", "low-rank", "experts"])
    arguments = parser.parse_args()
    backbone, _ = open_backbone(arguments.backbone, arguments.dtype, "auto", "cpu")
    makers = {
        "masked": lambda: masked(backbone),
        "cached": lambda: masked(backbone),
        "low-rank": lambda: low_rank(backbone, arguments.rank),
        "experts": lambda: experts(backbone),
    }
    result = {}
    for way in arguments.ways:
        variants = makers[way]()
        result[way] = {
            f"batch {size}": compare(backbone, variants, way == "cached", size, arguments)
            for size in arguments.batch
        }
    print(json.dumps({"threads": torch.get_num_threads(), **result}, indent=2))


def prompts(arguments: argparse.Namespace, size: int) -> torch.Tensor:
    """Modality ids (batch, length): media with a little text between them, then the question."""
    ids = [0] * 4
    for modality in range(1, MODALITIES + 1):
        ids += [modality] * arguments.tokens
    return torch.tensor([ids + [0] * (arguments.text - 4)]).repeat(size, 1)


@torch.inference_mode()
def compare(
    backbone, variants, cache: bool, size: int, arguments: argparse.Namespace
) -> dict[str, float]:
    """Best seconds of a prefill on both sides, and their ratio."""
    ids = prompts(arguments, size)
    embedding = backbone.get_input_embeddings()
    tokens = torch.randint(0, embedding.num_embeddings, ids.shape)
    embedded = embedding(tokens)
    best = {"dense": float("inf"), "routed": float("inf")}
    for _ in range(arguments.rounds):
        best["dense"] = min(best["dense"], prefill(backbone, embedded, ids))
        route_backbone(backbone, variants, text=arguments.words, cache=cache)
        prefill(backbone, embedded[:1], ids[:1])
        best["routed"] = min(best["routed"], prefill(backbone, embedded, ids))
        unroute_backbone(backbone)
    return {
        "dense_seconds": round(best["dense"], 4),
        "routed_seconds": round(best["routed"], 4),
        "ratio": round(best["routed"] / best["dense"], 3),
    }


def prefill(backbone, embedded: torch.Tensor, ids: torch.Tensor) -> float:
    started = time.perf_counter()
    with routed(backbone, ids):
        backbone(inputs_embeds=embedded, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - started


def noise(like: torch.Tensor) -> torch.Tensor:
    return (torch.randn(like.shape) * 1e-3).to(like.dtype)


def masked(backbone) -> dict[int, dict[str, MaskedWeight]]:
    """Theta_0, tau* and 1 bit a parameter and modality."""
    shared = {}
    for name in routable_parameters(backbone):
        base = backbone.get_parameter(name).detach()
        shared[name] = (base - noise(base), noise(base))
    return {
        modality: {
            name: MaskedWeight(base, delta, random_mask(base.numel()), 0.9)
            for name, (base, delta) in shared.items()
        }
        for modality in range(1, MODALITIES + 1)
    }


def random_mask(count: int) -> torch.Tensor:
    return torch.randint(0, 256, ((count + 7) // 8,), dtype=torch.uint8)


def low_rank(backbone, rank: int) -> dict[int, dict[str, LowRankWeight | DenseWeight]]:
    """Adapters of the linear layers beside the backbone's own weights."""

    def weight(parameter):
        if parameter.dim() < 2:
            return DenseWeight(parameter.detach())
        rows, columns = parameter.shape
        down, up = parameter.new_zeros(rank, columns), parameter.new_zeros(rows, rank)
        return LowRankWeight(parameter, noise(down), noise(up))

    return {
        modality: {
            name: weight(backbone.get_parameter(name)) for name in routable_parameters(backbone)
        }
        for modality in range(1, MODALITIES + 1)
    }


def experts(backbone) -> dict[int, dict[str, DenseWeight]]:
    """Full weights of each modality."""
    return {
        modality: {
            name: DenseWeight(backbone.get_parameter(name).detach().clone())
            for name in routable_parameters(backbone)
        }
        for modality in range(1, MODALITIES + 1)
    }


if __name__ == "__main__":
    main()
