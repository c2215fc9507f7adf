"""The parts of a model that can be asked, wherever they lie, and how they are put together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from graftline.encoders import describe_encoder
from graftline.errors import GraftlineError
from graftline.methods import Stage
from graftline.model.building import BUILDING
from graftline.model.loading import LoadedModel, assemble, read_connector, read_record
from graftline.model.opening import device_named, open_backbone
from graftline.model.prompts import PromptEncoder
from graftline.model.routing import (
    DenseWeight,
    LowRankWeight,
    RoutedModel,
    Weight,
    routable_parameters,
    route_backbone,
)
from graftline.model.routing.adapters import read_adapters
from graftline.model.routing.composed import route_to_experts, route_to_masks
from graftline.model.routing.router import Text
from graftline.planning.plan import Reference
from graftline.planning.run import RunPlan
from graftline.store import Store


@dataclass(frozen=True)
class Parts:
    """What a model is made of.

    Attributes:
        name: what people read.
        backbone: `transformers` folder; of the merged weights where media are routed.
        connectors: modality -> folder that holds its connector.
        encoders: modality -> name, sha256 and settings of its encoder, as plans record them.
        precision: dtype of the backbone.
        attention: `auto`, or `transformers`' name of an implementation.
        system_prompt: of the chat template.
        max_new_tokens: the longest answer.
        base: folder of theta_0, where media are routed to masked weights.
        experts: modality -> folder of the backbone that its tokens meet.
        adapters: modality -> folder of what its expert adds to theta_0.
        text: what text meets where media are routed.
        kinds: modality -> what its media are, where it is not called so.
    """

    name: str
    backbone: Path
    connectors: Mapping[str, Path]
    encoders: Mapping[str, Mapping[str, Any]]
    precision: str
    attention: str
    system_prompt: str
    max_new_tokens: int
    base: Path | None = None
    experts: Mapping[str, Path] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    text: Text = "merged"
    kinds: Mapping[str, str] = field(default_factory=dict)

    def kind_of(self, modality: str) -> str:
        """What a modality's media are."""
        return self.kinds.get(modality, modality)


def stage_of(plan: RunPlan, number: int | None) -> Stage:
    """A stage of a plan; the last one if no number is given.

    Raises:
        GraftlineError: the method has no such stage, or none at all.
    """
    method = plan.recipe.method
    if not plan.stages:
        raise GraftlineError(
            f"{method} leaves no single model: each modality keeps its own. Use --method route, "
            "which keeps every expert in one model, or a method that merges them."
        )
    for stage in plan.stages:
        if stage.index == (number or plan.stages[-1].index):
            return stage
    known = ", ".join(f"{stage.index} ({stage.modality})" for stage in plan.stages)
    raise GraftlineError(f"--stage {number}: {method} has the stages {known}.")


def parts_of_plan(plan: RunPlan, store: Store, stage: int | None = None) -> Parts:
    """The parts of a finished stage's model, verified, where they lie in the store.

    Args:
        plan: the run.
        store: its artifacts.
        stage: which stage's model; the last one's if left out.

    Raises:
        GraftlineError: the method has no such stage, or lists the parts that are not there.
        CorruptArtifact: a part is damaged.
    """
    recipe, chosen = plan.recipe, stage_of(plan, stage)
    model = chosen.final
    wanted = [model.backbone, *model.connectors.values(), *model.experts.values()]
    wanted += [*model.adapters.values(), *([model.base] if model.base else [])]
    folders: dict[Reference, Path] = {}
    for reference in dict.fromkeys(wanted):
        artifact = store.find(reference.kind, reference.fingerprint)
        if artifact is not None:
            folders[reference] = artifact.folder
    missing = [plan.steps[each].title for each in dict.fromkeys(wanted) if each not in folders]
    if missing:
        raise GraftlineError(
            f"{recipe.name}, {recipe.method}, seed {recipe.seed}: {len(missing)} part(s) of the "
            f"model are not in {store.root}: {', '.join(missing)}. Run the recipe first, "
            f"with --method {recipe.method} --seed {recipe.seed}."
        )
    backbones = {reference: folder / "backbone" for reference, folder in folders.items()}
    return Parts(
        name=f"{recipe.name} · {recipe.method} · seed {recipe.seed} · stage {chosen.index}",
        backbone=backbones[model.backbone],
        connectors={name: folders[each] for name, each in model.connectors.items()},
        encoders={
            name: describe_encoder(recipe.modality(name).encoder, recipe.kind_of(name))
            for name in model.connectors
        },
        precision=recipe.precision,
        attention=recipe.backbone.attention,
        system_prompt=recipe.backbone.system_prompt,
        max_new_tokens=recipe.evaluation.max_new_tokens,
        base=backbones[model.base] if model.base else None,
        experts={name: backbones[each] for name, each in model.experts.items()},
        adapters={name: backbones[each] for name, each in model.adapters.items()},
        text=model.text or recipe.compose.text,
        kinds={name: recipe.kind_of(name) for name in model.connectors},
    )


def load_parts(parts: Parts, device: str = "auto") -> LoadedModel:
    """Loads a model with all of its connectors, routed where it has something to route to.

    Args:
        parts: the model.
        device: as in a recipe.
    """
    place = device_named(device)
    backbone = open_backbone(parts.backbone, parts.precision, parts.attention, place)
    pairs = []
    for modality, folder in parts.connectors.items():
        record = read_record(folder, modality)
        pairs.append((record, read_connector(folder, record)))
    loaded = assemble(backbone, pairs, parts.system_prompt)
    if parts.adapters:
        return _routed_to_adapters(loaded, parts)
    if parts.experts:
        return route_to_experts(loaded, parts.experts, parts.text)
    if parts.base is not None:
        connectors = list(parts.connectors)
        return route_to_masks(loaded, connectors, parts.backbone, parts.base, parts.text)
    return loaded


def _routed_to_adapters(loaded: LoadedModel, parts: Parts) -> LoadedModel:
    """What `route_to_adapters` does, with adapters that a machine of another dtype wrote, too.

    They are stored in the dtype in which theta_0 was computed there (`computing_dtype`).
    """
    backbone, numbers = loaded.model.backbone, loaded.model.modality_numbers
    starts = {name: backbone.get_parameter(name).detach() for name in routable_parameters(backbone)}
    variants = {
        numbers[modality]: {
            name: _computed_like(starts[name], weight)
            for name, weight in read_adapters(folder, starts).items()
        }
        for modality, folder in parts.adapters.items()
        if modality in numbers
    }
    route_backbone(backbone, variants, text=parts.text)
    return replace(loaded, model=RoutedModel.around(loaded.model).eval())


def _computed_like(start: Tensor, weight: Weight) -> Weight:
    """An adapter's weight in the dtype of theta_0's parameter."""
    if isinstance(weight, LowRankWeight):
        return replace(weight, down=weight.down.to(start.dtype), up=weight.up.to(start.dtype))
    if isinstance(weight, DenseWeight):
        return replace(weight, weight=weight.weight.to(start.dtype))
    return weight


def read_tokenizer(backbone: Path) -> Any:
    """The tokenizer in a backbone's folder.

    Raises:
        GraftlineError: there is none, as where a model was taken apart that had none.
    """
    with BUILDING:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(
                str(backbone), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise GraftlineError(
                f"{backbone}: has no tokenizer that can be read; make the model again from one "
                "with tokenizer.json and tokenizer_config.json in its folder"
            ) from error


def prompts_of(parts: Parts) -> tuple[PromptEncoder, int | None]:
    """What a model's prompts are made by, and how many tokens it reads; its LLM is not loaded.

    Raises:
        GraftlineError: the backbone has no tokenizer, no chat template, or no end-of-sequence
            token.
    """
    with BUILDING:
        from transformers import AutoConfig

    folder = str(parts.backbone)
    tokenizer = read_tokenizer(parts.backbone)
    tokens = {
        modality: read_connector(place, read_record(place, modality)).tokens
        for modality, place in parts.connectors.items()
    }
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    try:
        prompts = PromptEncoder(tokenizer, tokens, parts.system_prompt)
    except GraftlineError as error:
        raise GraftlineError(f"{folder}: {error}") from error
    return prompts, getattr(config, "max_position_embeddings", None)
