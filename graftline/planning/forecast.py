"""What a run will cost, estimated before anything starts: time, operations, memory.

How it is estimated:

- **time**: what `graftline.planning.history` knows of such steps.
- **operations** of training: 6 N tokens where the backbone learns, 4 N tokens where it is frozen or
  learns through adapters (forward 2 N; backward 2 N through the weights, and 2 N for their own
  gradients; Kaplan et al. 2020, arXiv 2001.08361). N is the backbone's parameters. Attention's own
  products, connectors, padding and encoders are left out.
- **tokens** of a row: the medium's, the chat template's, and the text's characters divided by
  `CHARACTERS_A_TOKEN`.
- **memory** of a step: weights, and of what it trains gradients, fp32 master copy and two moments.
  Activations come on top; features are memory-mapped.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from graftline.data.rows import split_file
from graftline.model.opening import DTYPES
from graftline.model.own_backbone import backbone_name
from graftline.planning.history import history_of
from graftline.planning.inference import connector_size, encoder_shape, inference_flops
from graftline.planning.plan import TOGETHER, Step, is_done
from graftline.recipe import Recipe
from graftline.settings.models import BackboneSource
from graftline.store import Store

CHARACTERS_A_TOKEN = 4.0
"""Of English text, in a vocabulary of some 50,000 tokens."""
BYTE_LEVEL = frozenset({"tiny-random"})
"""Backbones with one token a character."""
_TEMPLATE_MARKS, _TEMPLATE_CHARACTERS = 4, len("user\n\nassistant\n")


@dataclass(frozen=True)
class BackboneShape:
    """What the number of a Llama-like decoder's parameters follows from.

    Attributes:
        vocabulary: tokens.
        width: of the hidden states.
        inner: width of the gated perceptrons.
        layers: decoder layers.
        heads: query heads.
        key_heads: key and value heads.
        head_width: of one head.
        tied: whether input and output embeddings are one matrix.
    """

    vocabulary: int
    width: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    tied: bool

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> BackboneShape:
        """The shape that a `config.json` of `transformers` describes.

        Raises:
            KeyError: the config is not that of a Llama-like decoder.
        """
        heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
        return cls(
            vocabulary=int(config["vocab_size"]),
            width=width,
            inner=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            key_heads=int(config.get("num_key_value_heads") or heads),
            head_width=int(config.get("head_dim") or width // heads),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    @property
    def embeddings(self) -> int:
        """Parameters of input and output embeddings."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def linear_layers(self) -> list[tuple[int, int]]:
        """(in, out) of the linear layers of one decoder layer."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        attention = [(self.width, queries), (self.width, keys), (self.width, keys)]
        gated = [(self.width, self.inner), (self.width, self.inner), (self.inner, self.width)]
        return [*attention, (queries, self.width), *gated]

    @property
    def parameters(self) -> int:
        """N: all parameters, tied embeddings once."""
        layer = sum(inputs * outputs for inputs, outputs in self.linear_layers) + 2 * self.width
        return self.embeddings + self.layers * layer + self.width

    def adapters(self, rank: int) -> int:
        """Parameters of low-rank adapters on every linear layer."""
        layer = sum(rank * (inputs + outputs) for inputs, outputs in self.linear_layers)
        return self.layers * layer


KNOWN_BACKBONES: Mapping[str, BackboneShape] = {
    "smollm2-135m-instruct": BackboneShape(49_152, 576, 1536, 30, 9, 3, 64, True),
    "tiny-random": BackboneShape(259, 64, 192, 2, 4, 2, 16, True),
}


@dataclass(frozen=True)
class StepForecast:
    """One step of a plan.

    Attributes:
        step: the step.
        group: the stage that needs it first; 0 for what stands beside the stages.
        cached: whether its artifact is there.
        seconds: what such steps took; None without history.
        flops: of its training; None where it trains nothing or the backbone is not known.
        memory_bytes: None where it streams or the backbone is not known.
        inference_flops: of encoding or answering; None where too little is known.
    """

    step: Step
    group: int
    cached: bool
    seconds: float | None
    flops: float | None
    memory_bytes: int | None
    inference_flops: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What the steps of a plan will cost.

    Attributes:
        steps: in the order in which they are shown.
        parameters: N of the backbone; None if it is not known.
        row_tokens: modality -> estimated tokens of a training row.
    """

    steps: tuple[StepForecast, ...]
    parameters: int | None
    row_tokens: Mapping[str, float]

    @property
    def to_run(self) -> list[StepForecast]:
        """The steps that are not there yet."""
        return [each for each in self.steps if not each.cached]

    @property
    def seconds(self) -> float:
        """Sum over the steps to run whose kind has a history."""
        return sum(each.seconds or 0.0 for each in self.to_run)

    @property
    def kinds_without_history(self) -> list[str]:
        """Kinds among the steps to run that never ran in this store."""
        return sorted({each.step.kind for each in self.to_run if each.seconds is None})

    @property
    def training_flops(self) -> float | None:
        """Sum over the steps to run; None if the backbone is not known."""
        if self.parameters is None:
            return None
        return sum(each.flops or 0.0 for each in self.to_run)

    @property
    def inference_flops(self) -> float:
        """Sum over the steps to run of which enough is known."""
        return sum(each.inference_flops or 0.0 for each in self.to_run)

    def gpu_hours(self, teraflops: float | None) -> float | None:
        """All operations at a rate in TFLOP/s; None without a rate or a known backbone."""
        if teraflops is None or self.training_flops is None:
            return None
        return (self.training_flops + self.inference_flops) / (teraflops * 1e12 * 3600)

    @property
    def memory_bytes(self) -> int | None:
        """Of the largest step to run; None if the backbone is not known."""
        if self.parameters is None:
            return None
        return max((each.memory_bytes or 0 for each in self.to_run), default=0)


def forecast(
    recipe: Recipe,
    groups: Iterable[tuple[int, Sequence[Step]]],
    store: Store,
    row_tokens: Mapping[str, float],
) -> Forecast:
    """Estimates what the steps of a plan will cost; computes none of them.

    Args:
        recipe: the recipe.
        groups: (stage, its steps), in the order in which they are shown.
        store: what is there, and how long it took.
        row_tokens: modality -> tokens of a training row, as `estimate_row_tokens` gives them.
    """
    groups = list(groups)
    shape = backbone_shape(recipe, groups, store)
    size = shape.parameters if shape else None
    history = history_of([step for _, steps in groups for step in steps], store)
    found = []
    for group, steps in groups:
        for step in steps:
            found.append(
                StepForecast(
                    step,
                    group,
                    is_done(step, store),
                    history.expected(step),
                    training_flops(step, size, row_tokens) if size else None,
                    step_memory(step, recipe, shape) if shape else None,
                    inference_flops(step, recipe, size, row_tokens),
                )
            )
    return Forecast(tuple(found), size, dict(row_tokens))


def backbone_shape(
    recipe: Recipe, groups: Iterable[tuple[int, Sequence[Step]]], store: Store
) -> BackboneShape | None:
    """The backbone's shape: from its artifact, its local folder, the recipe, or a known part."""
    steps = [step for _, each in groups for step in each if step.kind == "backbone"]
    folders = [store.notes(s.kind, s.reference.fingerprint) / "backbone" for s in steps]
    source = recipe.backbone.source
    if isinstance(source, BackboneSource) and source.folder is not None:
        folders.append(Path(source.folder))
    for folder in folders:
        try:
            text = (folder / "config.json").read_text(encoding="utf-8")
            return BackboneShape.of_config(json.loads(text))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if recipe.backbone.size is not None:
        return BackboneShape.of_config(recipe.backbone.size.model_dump())
    return KNOWN_BACKBONES.get(backbone_name(source))


def estimate_row_tokens(
    recipe: Recipe, modality: str, imported: Path | None = None
) -> float | None:
    """Estimated tokens of one training row: medium, chat template, question and first answer.

    Args:
        recipe: the recipe.
        modality: whose rows.
        imported: folder of the rows where they come from a source of the recipe's own.

    Returns:
        None where the training rows are not there to be measured.
    """
    usual = split_file(Path(recipe.data.folder), modality, "train")
    path = imported / usual.name if imported is not None else usual
    try:
        table = pq.read_table(path, columns=["question", "answers"])
    except (OSError, ValueError):  # pyarrow's own errors are among these
        return None
    limit = (recipe.data.rows or {}).get("train")
    rows = table.slice(0, limit).to_pylist()
    if not rows:
        return None
    characters = sum(len(row["question"] or "") for row in rows)
    characters += sum(len((row["answers"] or [""])[0]) for row in rows)
    text = characters / len(rows) + _TEMPLATE_CHARACTERS + len(recipe.backbone.system_prompt)
    per_token = 1.0 if backbone_name(recipe.backbone.source) in BYTE_LEVEL else CHARACTERS_A_TOKEN
    return recipe.modality(modality).connector.tokens + _TEMPLATE_MARKS + text / per_token


def training_flops(step: Step, parameters: int, row_tokens: Mapping[str, float]) -> float | None:
    """Operations of a training step; None where it trains nothing or its rows are not known."""
    given = step.parameters
    if "steps" not in given or "batch_size" not in given:
        return None
    modalities = given.get("modalities") or [given.get("modality")]
    lengths = [row_tokens[name] for name in modalities if name in row_tokens]
    if not lengths:
        return None
    tokens = given["steps"] * given["batch_size"] * statistics.fmean(lengths)
    return (6.0 if _trains_backbone(step) else 4.0) * parameters * float(tokens)


def _trains_backbone(step: Step) -> bool:
    """Whether gradients of the backbone's own weights are needed."""
    frozen = ("align", "realign", "realign-masked", "distil")
    return step.kind not in frozen and step.parameters.get("mode", "full") == "full"


def step_memory(step: Step, recipe: Recipe, shape: BackboneShape) -> int | None:
    """Weights, gradients, fp32 master and two moments of a step, in bytes.

    Returns:
        None for a step that holds no backbone (features) or streams it (merges).
    """
    given = step.parameters
    if "precision" not in given:
        return None
    size = DTYPES[given["precision"]].itemsize
    weights = shape.parameters * size * (2 if step.kind == "distil" else 1)  # old and new
    routed = {role.partition(".")[0] for role in step.parents} & {"base", "expert", "adapters"}
    if "steps" not in given:
        return weights * _copies(step, routed)
    trained = 0
    if _trains_backbone(step):
        trained = shape.parameters - (0 if given.get("train_embeddings") else shape.embeddings)
    elif given.get("mode") == "lora":
        trained = shape.adapters(given["lora"]["rank"])
        weights += trained * size
    names = given.get("modalities") or [given["modality"]]
    connectors = sum(_connector_parameters(recipe, name, shape.width) for name in names)
    master = 4 if size < 4 else 0  # a float32 weight is its own master
    execution = recipe.execution
    shares = execution.processes if execution.shard and step.kind in TOGETHER else 1
    return (weights + trained * (size + master + 8)) // shares + connectors * (4 + 4 + 8)


def _copies(step: Step, routed: set[str]) -> int:
    """How many times a model's weights are held while it answers."""
    if "expert" in routed:
        return 1 + sum(role.partition(".")[0] == "expert" for role in step.parents)
    if "base" in routed:  # theta_0, the merged task vector, the merged weights
        return 3
    return 2 if "adapters" in routed else 1


def _connector_parameters(recipe: Recipe, modality: str, width: int) -> int:
    """Parameters of a connector; 0 where the encoder's output is not known."""
    features = encoder_shape(recipe, modality)
    return connector_size(recipe, modality, features, width) if features else 0
