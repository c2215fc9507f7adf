"""An epoch of fine-tuning from cached features, beside one with the encoder in the loop.

Both take the same training steps; one looks features up, the other decodes and encodes the
batch's media each time. What caching costs once (encoding all rows) is measured too. Needs a
finished run:

    graftline run params/starter.yaml
    python benchmarks/features.py params/starter.yaml --modality video
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tasks.environment import prepare

prepare()

import torch
from starter_parts import artifacts, optimizer_of, untrained

from graftline.data.rows import decode, read_split
from graftline.encoders import describe_encoder, open_encoder
from graftline.model.multimodal import Batch
from graftline.settings.reading import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--modality", default="video")
    parser.add_argument("--steps", type=int, default=8, help="of an epoch, in each of the rounds")
    parser.add_argument("--rounds", type=int, default=2, help="both are measured, in turn")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    modality = arguments.modality
    loaded, batches = untrained(recipe, modality, artifacts(recipe, modality), torch.bfloat16)
    optimizer = optimizer_of(loaded, modality)
    kind = recipe.kind_of(modality)
    encoder = open_encoder(describe_encoder(recipe.modality(modality).encoder, kind), "cpu")
    media = read_split(Path(recipe.data.folder), modality, "train")["media"]

    def cached(batch: Batch) -> Batch:
        return batch

    def encoded(batch: Batch) -> Batch:
        """The same number of media as the batch has, decoded and encoded now."""
        chosen = [decode(medium, modality) for medium in media[: len(batch.token_ids)]]
        return replace(batch, media={modality: encoder.encode(chosen)})

    def seconds(prepared: Callable[[Batch], Batch]) -> float:
        started = time.perf_counter()
        for step in range(arguments.steps):
            loaded.model(prepared(batches.batch(step))).backward()
            optimizer.step(1.0)
        return (time.perf_counter() - started) / arguments.steps

    seconds(cached)
    rounds = [(seconds(cached), seconds(encoded)) for _ in range(arguments.rounds)]
    best_cached, best_encoded = (min(times) for times in zip(*rounds, strict=True))
    started = time.perf_counter()
    encoder.encode([decode(medium, modality) for medium in media[:64]])
    once = (time.perf_counter() - started) / 64 * len(media)
    steps = len(media) / recipe.fine_tune.batch_size
    result = {
        "epoch_seconds": {
            "cached features": steps * best_cached,
            "encoder in the loop": steps * best_encoded,
        },
        "ratio": round(best_encoded / best_cached, 2),
        "encoding_all_rows_once_seconds": once,
        "epochs_until_caching_pays": round(once / (steps * (best_encoded - best_cached)), 2),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
