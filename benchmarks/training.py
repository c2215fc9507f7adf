"""Training tokens per second: Graftline's loop beside a plain `transformers.Trainer`, in one run.

Same backbone, connector, rows, batch size and number of trained weights; bf16 arithmetic in both
(the Trainer's way: fp32 weights under autocast). Also the floor: FLOP/s reached against the
machine's own bf16 matmul rate. Needs the artifacts of one finished run:

    graftline run params/starter.yaml
    python benchmarks/training.py params/starter.yaml --steps 12
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from tasks.environment import prepare

prepare()

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from graftline.data.build import checksums
from graftline.data.examples import ExampleSet, TrainingSet
from graftline.data.features import FeatureTable
from graftline.model.backbone import load_backbone
from graftline.model.loading import assemble, new_connector
from graftline.model.multimodal import IGNORED, Batch
from graftline.recipe import Recipe, load_recipe
from graftline.run_plan import plan_run
from graftline.store import Store
from graftline.training.optimizer import MasterAdamW, ParameterGroup
from tasks.data import by_modality

WARM_UP = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--modality", default="audio")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument(
        "--rounds", type=int, default=2, help="both are measured this often, in turn"
    )
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    backbone, features = _artifacts(recipe, arguments.modality)
    rates: dict[str, list[float]] = {"graftline": [], "transformers.Trainer": []}
    for _ in range(arguments.rounds):
        rates["graftline"].append(
            ours(recipe, arguments.modality, backbone, features, arguments.steps)
        )
        rates["transformers.Trainer"].append(
            theirs(recipe, arguments.modality, backbone, features, arguments.steps)
        )
    best = {name: max(values) for name, values in rates.items()}
    matmul = matmul_rate()
    weights = sum(
        p.numel() for n, p in load_backbone(backbone)[0].named_parameters() if "embed" not in n
    )
    result = {
        "tokens_per_second": rates,
        "ratio": round(best["graftline"] / best["transformers.Trainer"], 2),
        "matmul_flops_per_second": matmul,
        "reached_flops_per_second": 6 * weights * best["graftline"],
        "share_of_matmul_rate": round(6 * weights * best["graftline"] / matmul, 3),
    }
    print(json.dumps(result, indent=2))


def _artifacts(recipe: Recipe, modality: str) -> tuple[Path, Path]:
    plan = plan_run(recipe, by_modality(checksums(Path(recipe.data.folder))))
    store = Store(recipe.store)
    found = {}
    for reference, step in plan.steps.items():
        if step.kind == "backbone" or step.parameters.get("modality") == modality:
            artifact = store.find(reference.kind, reference.fingerprint)
            if artifact is not None:
                found.setdefault(step.kind, artifact.folder)
    return found["backbone"] / "backbone", found["features"]


def _setting(recipe: Recipe, modality: str, backbone: Path, features: Path, dtype: torch.dtype):
    attention = "eager" if dtype == torch.bfloat16 else "sdpa"
    loaded_backbone = load_backbone(backbone, dtype, attention)
    rows = FeatureTable(features / "train")[:]
    shape = recipe.modality(modality).connector.model_dump()
    pair = new_connector(modality, loaded_backbone[0], rows, shape, 0, "benchmark")
    loaded = assemble(loaded_backbone, [pair], "")
    examples = ExampleSet(features, modality, "train", loaded.prompts)
    batches = TrainingSet([examples], recipe.fine_tune.batch_size, 0)
    embeddings = loaded.model.backbone.get_input_embeddings().weight
    embeddings.requires_grad_(False)
    return loaded, batches


def ours(recipe: Recipe, modality: str, backbone: Path, features: Path, steps: int) -> float:
    """Tokens (without padding) a second."""
    loaded, batches = _setting(recipe, modality, backbone, features, torch.bfloat16)
    chosen = [p for p in loaded.model.backbone.parameters() if p.requires_grad]
    groups = [
        ParameterGroup("connector", list(loaded.model.connectors[modality].parameters()), 1e-4),
        ParameterGroup("backbone", chosen, 1e-4),
    ]
    optimizer = MasterAdamW(groups, 0.0, 1.0)
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


def theirs(recipe: Recipe, modality: str, backbone: Path, features: Path, steps: int) -> float:
    """The same batches through `transformers.Trainer` with `bf16=True`."""
    loaded, batches = _setting(recipe, modality, backbone, features, torch.float32)
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
                bf16=True,
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
    """The best bf16 matmul FLOP/s of the shapes that a step has."""
    best = 0.0
    for rows, inner, columns in ((192, 576, 1536), (384, 576, 1536), (2048, 2048, 2048)):
        left = torch.randn(rows, inner, dtype=torch.bfloat16)
        right = torch.randn(columns, inner, dtype=torch.bfloat16)
        for _ in range(20):
            started = time.perf_counter()
            torch.nn.functional.linear(left, right)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    main()
