"""What a run will do, known before it starts: steps, their parameters and their parents.

A step's fingerprint depends on its kind, its code, its parameters and its parents' fingerprints
alone. So a plan can be made, printed, counted and compared with the artifact store without
computing anything, and two methods that share a step share its artifact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

from graftline.encoders import describe_encoder, encoder_code
from graftline.manifest import fingerprint_of
from graftline.merging.rules import parameters_for, rule_named
from graftline.model.connector_kinds import connector_parameters
from graftline.model.own_backbone import backbone_parameters
from graftline.recipe import PhaseSettings, Recipe
from graftline.step_code import code_digest, source_digest
from graftline.store import Artifact, Store

TOGETHER = frozenset(
    {"features", "align", "fine-tune", "realign", "realign-masked", "evaluate", "evaluate-joint"}
)
"""Kinds of steps that several processes can carry out, each with its share of the rows."""


@dataclass(frozen=True)
class Reference:
    """A published artifact, or one that will be: what steps and tasks hand to each other."""

    kind: str
    fingerprint: str


@dataclass(frozen=True)
class Step:
    """One unit of work that publishes one artifact.

    Attributes:
        kind: one of `CODE`.
        parameters: plain data that the result depends on.
        parents: role -> the artifact that plays it.
        label: what people read; not part of the fingerprint.
        stage: the stage it belongs to, from 1; 0 for what stands before or beside the stages.
    """

    kind: str
    parameters: Mapping[str, Any]
    parents: Mapping[str, Reference]
    label: str
    stage: int

    @property
    def code(self) -> str:
        """Digest of the source that computes this kind of step."""
        return code_digest(self.kind)

    @property
    def title(self) -> str:
        """The label with its stage."""
        return f"stage {self.stage} · {self.label}" if self.stage else self.label

    @property
    def reference(self) -> Reference:
        """Where the result will be found."""
        fingerprint = fingerprint_of(
            self.kind,
            parameters=self.parameters,
            parents={role: parent.fingerprint for role, parent in self.parents.items()},
            code=self.code,
        )
        return Reference(self.kind, fingerprint)

    def publish(self, store: Store, build: Callable[[Path], None]) -> Artifact:
        """Has a store build this step's artifact, unless it is there; see `Store.publish`."""
        return store.publish(
            self.kind,
            self.reference.fingerprint,
            parameters=dict(self.parameters),
            parents={role: parent.fingerprint for role, parent in self.parents.items()},
            code=self.code,
            build=build,
        )


@dataclass(frozen=True)
class Model:
    """A multimodal model as a plan sees it: which artifacts hold its parts.

    Attributes:
        backbone: what all tokens meet; where media are routed, it holds the merged weights.
        connectors: modality -> who holds its connector.
        experts: modality -> the backbone that its tokens meet, where they are routed to experts.
        base: theta_0, where media are routed to masked weights.
        adapters: modality -> what its expert adds to theta_0, where experts are kept so.
        text: what text meets where media are routed; as the recipe says if left out.
    """

    backbone: Reference
    connectors: Mapping[str, Reference] = field(default_factory=dict)
    experts: Mapping[str, Reference] = field(default_factory=dict)
    base: Reference | None = None
    adapters: Mapping[str, Reference] = field(default_factory=dict)
    text: Literal["modality"] | None = None

    def with_connector(self, modality: str, connector: Reference) -> Model:
        """This model with one connector added or replaced."""
        return replace(self, connectors={**self.connectors, modality: connector})


class Planner:
    """Makes the steps of a recipe; the same step asked for twice is one step.

    Args:
        recipe: the recipe.
        data_files: modality -> split -> md5 of its parquet file.
    """

    def __init__(self, recipe: Recipe, data_files: Mapping[str, Mapping[str, str]]) -> None:
        self.recipe = recipe
        self.data_files = data_files
        self.steps: dict[Reference, Step] = {}

    @classmethod
    def beside(cls, planner: Planner) -> Self:
        """The same plan: the steps of either are steps of both."""
        own = cls(planner.recipe, planner.data_files)
        own.steps = planner.steps
        return own

    def common(self) -> Self:
        """The same plan, by what all methods of the recipe share: for what gains compare with."""
        own = self.beside(self)
        own.recipe = self.recipe.common()
        return own

    def backbone(self) -> Reference:
        """theta_0, as a folder that `transformers` loads."""
        parameters = backbone_parameters(self.recipe.backbone.source)
        return self._add("backbone", parameters, {}, "base LLM", 0)

    def rows(self, modality: str) -> Reference:
        """Rows that a recipe's own source gave; they are imported before a run is planned."""
        return self._noted(rows_step(modality, self.data_files[modality]))

    def bundle(self, digest: str) -> Reference:
        """An exported model that was taken into the store, backbone and connectors."""
        return self._noted(bundle_step(digest))

    def features(self, modality: str) -> Reference:
        """What the frozen encoder says of every row, and the rows' text."""
        encoder = self.recipe.modality(modality).encoder
        described = describe_encoder(encoder, self.recipe.kind_of(modality))
        parameters = {
            "modality": modality,
            "encoder": described,
            **encoder_code(described),
            "files": dict(self.data_files[modality]),
            "rows": self.recipe.data.rows,
        }
        kind = self.recipe.kind_of(modality)
        if kind != modality:
            parameters["media"] = kind
        imported = self.recipe.modality(modality).data is not None
        parents = {"rows": self.rows(modality)} if imported else {}
        return self._add("features", parameters, parents, f"{modality}: features", 0)

    def align(self, backbone: Reference, modality: str, stage: int) -> Reference:
        """MERA step 1: a new connector, trained alone."""
        parameters = {
            **self._training(self.recipe.align),
            "modality": modality,
            "connector": connector_parameters(self.recipe.modality(modality).connector),
        }
        parents = {"backbone": backbone, f"features.{modality}": self.features(modality)}
        return self._add("align", parameters, parents, f"{modality}: align", stage)

    def fine_tune(
        self, model: Model, modalities: tuple[str, ...], stage: int, mode: str | None = None
    ) -> Model:
        """MERA step 2: backbone and connectors trained on `modalities` (all at once if several)."""
        settings = self.recipe.fine_tune
        parameters = {
            **self._training(settings),
            "modalities": list(modalities),
            "mode": mode or settings.mode,
            "steps": settings.steps * len(modalities),
        }
        if parameters["mode"] != "lora":
            del parameters["lora"]
        parents = {"backbone": model.backbone}
        for modality in modalities:
            parents[f"connector.{modality}"] = model.connectors[modality]
            parents[f"features.{modality}"] = self.features(modality)
        label = f"{' + '.join(modalities)}: fine-tune"
        tuned = self._add("fine-tune", parameters, parents, label, stage)
        kept = model.backbone if parameters["mode"] == "connector" else tuned
        return Model(kept, {**model.connectors, **dict.fromkeys(modalities, tuned)})

    def merge(self, previous: Reference, vanilla: Reference, stage: int) -> Reference:
        """MERA step 3: theta_i from theta_{i-1} and theta_i^v.

        By eq. 4.1, or [ours] by another rule on what the two have learned since theta_0.
        """
        rule = self.recipe.merge.rule
        if rule != "running-average":
            both = {"before": previous, "vanilla": vanilla}
            return self._combine(rule, self.recipe.merge.parameters, both, stage, "merge")
        parameters = {"rule": rule, "stage": stage}
        parents = {"previous": previous, "vanilla": vanilla}
        return self._add("merge", parameters, parents, "merge", stage)

    def realign(
        self, model: Model, modality: str, stage: int, *, on_all: bool = False
    ) -> Reference:
        """MERA step 4: one connector trained on its replay beside the frozen merged backbone.

        Args:
            model: the merged backbone, and the connectors as the stage before left them.
            modality: whose connector.
            stage: i.
            on_all: on all its rows, which are at hand at its own stage; none is kept then.
        """
        parameters = {**self._training(self.recipe.realign), "modality": modality}
        if not on_all:
            parameters["fraction"] = self.recipe.replay.fraction
        parents = {
            "backbone": model.backbone,
            f"connector.{modality}": model.connectors[modality],
            f"features.{modality}": self.features(modality),
        }
        return self._add("realign", parameters, parents, f"{modality}: realign", stage)

    def compose(self, rule: str, experts: Mapping[str, Model]) -> Reference:
        """theta* from experts that were trained apart from theta_0, in the order given."""
        given = {str(name): values for name, values in self.recipe.compose.parameters.items()}
        backbones = {name: model.backbone for name, model in experts.items()}
        return self._combine(rule, given.get(rule, {}), backbones, len(experts), "compose")

    def adapters(self, expert: Reference, modality: str, rank: int) -> Reference:
        """What an expert adds to theta_0, as a product of this rank in every linear layer."""
        parents = {"backbone": self.backbone(), "expert": expert}
        parameters = {"rank": rank, **self._numerics()}
        return self._add("adapters", parameters, parents, f"{modality}: adapters", 0)

    def _combine(
        self,
        rule: str,
        given: Mapping[str, Any],
        experts: Mapping[str, Reference],
        stage: int,
        what: str,
    ) -> Reference:
        checked = parameters_for(rule_named(rule), given, len(experts))
        parameters = {
            "rule": rule,
            "parameters": checked.model_dump(mode="json"),
            "modalities": list(experts),
            "seed": self.recipe.seed,
        }
        parents = {"base": self.backbone()}
        parents |= {f"expert.{name}": backbone for name, backbone in experts.items()}
        return self._add("compose", parameters, parents, f"{rule}: {what}", stage)

    def evaluate(self, model: Model, modality: str, stage: int, point: str) -> Reference:
        """Answers and scores of one modality's rows."""
        parameters, parents = self._asked(model, [modality])
        parameters["modality"] = modality
        return self._add("evaluate", parameters, parents, f"{modality}: evaluate {point}", stage)

    def evaluate_joint(self, model: Model, stage: int) -> Reference:
        """Answers and scores of conversations over media of several modalities."""
        parameters, parents = self._asked(model, sorted(model.connectors))
        return self._add("evaluate-joint", parameters, parents, "joint questions", stage)

    def _asked(
        self, model: Model, modalities: Sequence[str]
    ) -> tuple[dict[str, Any], dict[str, Reference]]:
        """Parameters and parents of a step that asks a model about some modalities."""
        settings = self.recipe.evaluation
        parameters = {
            "split": settings.split,
            "max_new_tokens": settings.max_new_tokens,
            "batch_size": settings.batch_size,
            **self._numerics(),
        }
        parents = {"backbone": model.backbone}
        if model.base is not None or model.experts or model.adapters:
            parameters["routing"] = source_digest("model/routing/*.py")
            parameters["text"] = model.text or self.recipe.compose.text
        if model.base is not None:
            parents["base"] = model.base
        parents |= {f"adapters.{name}": each for name, each in model.adapters.items()}
        for modality in modalities:
            parents[f"connector.{modality}"] = model.connectors[modality]
            parents[f"features.{modality}"] = self.features(modality)
            if modality in model.experts:
                parents[f"expert.{modality}"] = model.experts[modality]
        return parameters, parents

    def perplexity(self, backbone: Reference, stage: int) -> Reference:
        """Perplexity of the fixed held-out text."""
        parents = {"backbone": backbone}
        return self._add("perplexity", self._numerics(), parents, "text: perplexity", stage)

    def _numerics(self) -> dict[str, Any]:
        return {
            "precision": self.recipe.precision,
            "attention": self.recipe.backbone.attention,
            "system_prompt": self.recipe.backbone.system_prompt,
        }

    def _training(self, settings: PhaseSettings) -> dict[str, Any]:
        # a checkpoint changes no result, and what realigning starts from is a parent
        chosen = settings.model_dump(exclude_none=True, exclude={"checkpoint_every", "start"})
        return {**chosen, "seed": self.recipe.seed, **self._numerics()}

    def _add(
        self,
        kind: str,
        parameters: Mapping[str, Any],
        parents: Mapping[str, Reference],
        label: str,
        stage: int,
    ) -> Reference:
        return self._noted(Step(kind, parameters, parents, label, stage))

    def _noted(self, step: Step) -> Reference:
        reference = step.reference
        self.steps.setdefault(reference, step)
        return reference


def rows_step(modality: str, files: Mapping[str, str]) -> Step:
    """Rows in the store, known by their content alone: split -> md5 of its parquet file."""
    return Step("rows", {"files": dict(files)}, {}, f"{modality}: rows", 0)


def bundle_step(digest: str) -> Step:
    """An exported model in the store, known by its folder's digest."""
    return Step("bundle", {"digest": digest}, {}, "exported model", 0)


def is_done(step: Step, store: Store) -> bool:
    """Whether a step's artifact is published."""
    return store.holds(step.kind, step.reference.fingerprint)
