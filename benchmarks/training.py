"""Training tokens per second: Graftline's loop beside a plain `transformers.Trainer`, in one run.

Same backbone, connector, rows, batch size and number of trained weights; bf16 arithmetic in both
(the Trainer's way: fp32 weights under autocast). Each measurement is a process of its own: that of
Graftline with the variables that its commands set (`tasks/environment.py`), the Trainer's without
them, as a user would start it, and once more with them; and without bf16, which some CPUs multiply
slower than float32. Also the floor: FLOP/s reached against the machine's own matmul rate, the
higher of bf16's and float32's. Needs the artifacts of one finished run:

    graftline run params/starter.yaml
    python benchmarks/training.py params/starter.yaml --steps 12
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

from tasks.environment import prepare

GRAFTLINE, TRAINER, PREPARED = "graftline", "transformers.Trainer", "Trainer, our environment"
FLOAT32 = "Trainer, float32"
SIDES = (GRAFTLINE, TRAINER, PREPARED, FLOAT32)
PLAIN = dict(os.environ)
if TRAINER not in sys.argv and FLOAT32 not in sys.argv:
    prepare()

import torch
from starter_parts import artifacts, optimizer_of, untrained
from transformers import Trainer, TrainerCallback, TrainingArguments

from graftline.model.backbone import load_backbone
from graftline.model.multimodal import IGNORED, Batch
from graftline.recipe import Recipe
from graftline.settings.reading import load_recipe

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--modality", default="audio")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--rounds", type=int, default=3, help="each is measured this often, in turn"
    )
    parser.add_argument("--side", choices=SIDES, help="measure one, here")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    found = artifacts(recipe, arguments.modality)
    if arguments.side:
        asked = (recipe, arguments.modality, found, arguments.steps)
        mine = arguments.side == GRAFTLINE
        print(ours(*asked) if mine else theirs(*asked, arguments.side != FLOAT32))
        return
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(arguments.rounds):
        for side, measured in rates.items():
            measured.append(apart(side))
    best = {name: max(values) for name, values in rates.items()}
    matmul = matmul_rate()
    weights = sum(
        p.numel()
        for n, p in load_backbone(found["backbone"] / "backbone")[0].named_parameters()
        if "embed" not in n
    )
    result = {
        "tokens_per_second": rates,
        "ratio": round(best[GRAFTLINE] / best[TRAINER], 2),
        "ratio_in_one_environment": round(best[GRAFTLINE] / best[PREPARED], 2),
        "ratio_to_float32": round(best[GRAFTLINE] / best[FLOAT32], 2),
        "matmul_flops_per_second": matmul,
        "reached_flops_per_second": 6 * weights * best[GRAFTLINE],
        "share_of_matmul_rate": round(6 * weights * best[GRAFTLINE] / matmul, 3),
    }
    print(json.dumps(result, indent=2))


def apart(side: str) -> float:
    """Measures one side in a process of its own."""
    words = [sys.executable, *sys.argv, "--side", side]
    done = subprocess.run(words, env=PLAIN, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def ours(recipe: Recipe, modality: str, found: dict[str, Path], steps: int) -> float:
    """Tokens (without padding) a second."""
    loaded, batches = untrained(recipe, modality, found, torch.bfloat16)
    optimizer = optimizer_of(loaded, modality)
    tokens, started = 0, 0.0
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            tokens, started = 0, time.perf_counter()
        batch = batches.batch(step)
        loaded.model(batch).backward()
        optimizer.step(1.0)
        tokens += batch.tokens
    return tokens / (time.perf_counter() - started)


class _Plain(torch.nn.Module):
    """What one would write first: all logits, labels as long as the prompt."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Batch, **_: object) -> dict[str, torch.Tensor]:
        labels = torch.full_like(batch.token_ids, IGNORED)
        labels[:, -batch.labels.shape[1] :] = batch.labels
        output = self.model.backbone(
            inputs_embeds=self.model.embed(batch),
            attention_mask=batch.attention_mask,
            labels=labels,
            use_cache=False,
        )
        return {"loss": output.loss}


class _Clock(TrainerCallback):
    def __init__(self) -> None:
        self.started = 0.0

    def on_step_end(self, args, state, control, **_: object):
        if state.global_step == WARM_UP:
            self.started = time.perf_counter()


def theirs(recipe: Recipe, modality: str, found: dict[str, Path], steps: int, bf16: bool) -> float:
    """The same batches through `transformers.Trainer`, with `bf16=True` or in float32."""
    loaded, batches = untrained(recipe, modality, found, torch.float32)
    made = [batches.batch(step) for step in range(WARM_UP + steps)]
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=_Plain(loaded.model),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=1,
                max_steps=WARM_UP + steps,
                learning_rate=1e-4,
                bf16=bf16,
                use_cpu=not torch.cuda.is_available(),
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                remove_unused_columns=False,
                dataloader_pin_memory=False,
            ),
            train_dataset=_Rows(len(made)),
            data_collator=lambda rows: {"batch": made[rows[0]]},
            callbacks=[clock],
        )
        trainer.get_train_dataloader = lambda: _Batches(made)
        trainer.train()
    seconds = time.perf_counter() - clock.started
    return sum(batch.tokens for batch in made[WARM_UP:]) / seconds


class _Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class _Batches:
    """A loader that gives the same batches in the same order as ours."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter({"batch": batch} for batch in self.batches)


def matmul_rate() -> float:
    """The best matmul FLOP/s of the shapes that a step has, in bf16 or float32."""
    best = 0.0
    shapes = ((192, 576, 1536), (384, 576, 1536), (2048, 2048, 2048))
    for dtype, (rows, inner, columns) in product((torch.bfloat16, torch.float32), shapes):
        left = torch.randn(rows, inner, dtype=dtype)
        right = torch.randn(columns, inner, dtype=dtype)
        for _ in range(20):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
