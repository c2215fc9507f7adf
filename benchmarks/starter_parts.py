"""What the benchmarks take from a finished run of a recipe: its base LLM, features and experts."""

from __future__ import annotations

from pathlib import Path

import torch

from graftline.data.build import by_modality, checksums
from graftline.data.examples import ExampleSet, TrainingSet
from graftline.data.features import FeatureTable
from graftline.model.backbone import load_backbone
from graftline.model.loading import (
    LoadedModel,
    assemble,
    new_connector,
    read_connector,
    read_record,
)
from graftline.model.opening import open_backbone
from graftline.planning.run import plan_run
from graftline.recipe import Recipe
from graftline.stores import open_store
from graftline.training.optimizer import MasterAdamW, ParameterGroup


def artifacts(recipe: Recipe, modality: str) -> dict[str, Path]:
    """Kind of step -> folder of the first finished one, of those that concern `modality`."""
    plan = plan_run(recipe, by_modality(checksums(Path(recipe.data.folder))))
    store = open_store(recipe.store)
    found: dict[str, Path] = {}
    for reference, step in plan.steps.items():
        chosen = step.parameters.get("modalities") or [step.parameters.get("modality")]
        if step.kind == "backbone" or chosen == [modality]:
            artifact = store.find(reference.kind, reference.fingerprint)
            if artifact is not None:
                found.setdefault(step.kind, artifact.folder)
    missing = {"backbone", "features", "fine-tune"} - set(found)
    if missing:
        raise SystemExit(f"not in {recipe.store}: {', '.join(sorted(missing))}; run the recipe")
    return found


def untrained(
    recipe: Recipe, modality: str, found: dict[str, Path], dtype: torch.dtype
) -> tuple[LoadedModel, TrainingSet]:
    """The base LLM with a new connector, and the batches of its fine-tuning."""
    folder = found["backbone"] / "backbone"
    if dtype == torch.bfloat16:
        backbone = open_backbone(folder, "bfloat16", "auto", "cpu")
    else:
        backbone = load_backbone(folder, dtype, "sdpa")
    rows = FeatureTable(found["features"] / "train")[:]
    shape = recipe.modality(modality).connector.model_dump()
    pair = new_connector(modality, backbone[0], rows, shape, 0, "benchmark")
    loaded = assemble(backbone, [pair], "")
    examples = ExampleSet(found["features"], modality, "train", loaded.prompts)
    batches = TrainingSet([examples], recipe.fine_tune.batch_size, 0)
    loaded.model.backbone.get_input_embeddings().weight.requires_grad_(False)
    return loaded, batches


def optimizer_of(loaded: LoadedModel, modality: str) -> MasterAdamW:
    """An optimiser of all that fine-tuning trains."""
    connector = list(loaded.model.connectors[modality].parameters())
    backbone = [p for p in loaded.model.backbone.parameters() if p.requires_grad]
    groups = [ParameterGroup("connector", connector, 1e-4), ParameterGroup("llm", backbone, 1e-4)]
    return MasterAdamW(groups, 0.0, 1.0)


def expert(modality: str, found: dict[str, Path], split: str) -> tuple[LoadedModel, ExampleSet]:
    """A fine-tuned LLM with its connector, and the rows of a split."""
    folder = found["fine-tune"]
    record = read_record(folder, modality)
    backbone = load_backbone(folder / "backbone")
    loaded = assemble(backbone, [(record, read_connector(folder, record))], "")
    return loaded, ExampleSet(found["features"], modality, split, loaded.prompts)
