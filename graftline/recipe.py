"""What the user wants: a recipe, as `settings.reading` reads it from `params/*.yaml`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, PrivateAttr, model_validator

from graftline.recipe_parts import Part as Part
from graftline.recipe_parts import PhaseSettings as PhaseSettings
from graftline.recipe_parts import Place, Split
from graftline.settings.models import (
    BackboneChoice,
    BackboneSize,
    ConnectorSettings,
    EncoderChoice,
    EstimateSettings,
)
from graftline.settings.realigning import CorrectionSettings, DistilSettings, MeraPlusSettings
from graftline.settings.rivals import LoraSettings as LoraSettings
from graftline.settings.rivals import RivalSettings
from graftline.settings.sources import SourceSettings
from graftline.settings.type_problems import nearest

Modality = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
MediaKind = Literal["image", "audio", "video", "point_cloud", "features"]
KINDS: tuple[str, ...] = get_args(MediaKind)
RESERVED = ("answer", "joint", "question", "text")
"""What reports and tables call something else."""
RivalName = Literal["replay", "ewc", "lwf", "der", "attention-only", "o-lora", "pathweave"]
BeyondName = Literal["mera+", "mera-corrected", "mera-distilled", "mera-masks"]
ContinualName = Literal[
    "mera", "merge-only", "realign-only", "finetune", "connector-only", "joint", "experts",
    RivalName, BeyondName,
]  # fmt: skip
CompositionName = Literal[
    "average", "task-arithmetic", "ties", "dare-ties", "consensus", "pcb", "emr", "mmer", "route"
]
MergeName = Literal["running-average", "average", "task-arithmetic", "ties", "dare-ties", "pcb"]
MethodName = Literal[ContinualName, CompositionName]
RIVALS: tuple[str, ...] = get_args(RivalName)
COMPOSITIONS: tuple[str, ...] = get_args(CompositionName)
Fraction = Field(gt=0.0, le=1.0)
OWN = (
    "align", "fine_tune", "realign", "replay", "merge", "compose", "rivals", "correction", "distil",
    "mera_plus",
)  # fmt: skip
"""Sections that `methods` may set for one method alone: how it learns, not what or on what."""


class DataSettings(Part):
    """Which rows are used."""

    folder: Place = Field("data", description="folder of <modality>/<split>.parquet")
    rows: dict[Split, PositiveInt] | None = Field(
        None, description="use only the first rows of each split (all when left out)"
    )


class BackboneSettings(Part):
    """The LLM shared by all modalities."""

    source: BackboneChoice = Field(
        "smollm2-135m-instruct",
        description="smollm2-135m-instruct, tiny-random, or your own as {name, revision}, {folder} "
        "or {gguf}",
    )
    system_prompt: str = Field("", description="text of the chat template's system turn")
    attention: Literal["auto", "eager", "sdpa"] = Field(
        "auto",
        description="auto: grouped matrix products on CPU (faster there), on a GPU sdpa where the "
        "LLM has it",
    )
    size: BackboneSize | None = Field(
        None, description="what a plan assumes before the weights are here; changes no result"
    )


class ModalitySettings(Part):
    """One modality: who encodes it and how it is connected."""

    encoder: EncoderChoice
    media: MediaKind | None = Field(
        None, description="what its rows hold; left out where the modality is called so"
    )
    data: SourceSettings | None = Field(
        None, description="where its rows come from; data.folder if left out"
    )
    connector: ConnectorSettings = ConnectorSettings()


class RealignSettings(PhaseSettings):
    """Realigning: which part of a connector learns from the replay."""

    part: Literal["output", "all"] = Field(
        "output",
        description="output: its last layer alone, which a small replay overfits less; all: as in "
        "the paper",
    )
    start: Literal["merged", "corrected"] = Field(
        "merged",
        description="merged: connectors as the merge finds them; corrected: in closed form first",
    )
    passes: float | None = Field(
        None,
        gt=0.0,
        description="most passes over the replay: `steps` are cut where few rows were kept, which "
        "would be learned by heart",
    )


class FineTuneSettings(PhaseSettings):
    """Fine-tuning of backbone and connector."""

    connector_learning_rate: float = Field(gt=0.0)
    mode: Literal["full", "lora"] = "full"
    lora: LoraSettings = LoraSettings()
    train_embeddings: bool = Field(False, description="also train input and output embeddings")


class ReplaySettings(Part):
    """The seeded random share of each modality's training rows that later stages may see."""

    fraction: float = Fraction


class MergeSettings(Part):
    """How theta_{i-1} and theta_i^v become theta_i."""

    rule: MergeName = Field(
        "running-average",
        description="MERA's eq. 4.1, or a rule of `graftline merge` on the two, from theta_0",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="of the rule; what is left out keeps the paper's default",
    )
    coefficient: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="of the running average: what theta_i takes of theta_i^v; 1/i if left out",
    )
    depth: float = Field(
        0.0,
        ge=-1.0,
        le=1.0,
        description="of the running average: how the coefficient grows from the first layer, "
        "1 - depth times it, to the last, 1 + depth times it",
    )


class ComposeSettings(Part):
    """How experts become one model, for the methods that compose."""

    parameters: dict[CompositionName, dict[str, Any]] = Field(
        default_factory=dict,
        description="rule -> its parameters; what is left out keeps the paper's default",
    )
    growing: bool = Field(
        False,
        description="one modality after another: each expert enters as one more task vector, and "
        "old ones are measured again (BRG); otherwise all are combined at once",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="of `route`: keep each expert as theta_0 and a product of this rank in every "
        "linear layer (LoRA experts kept apart); whole experts if left out",
    )
    text: Literal["merged", "modality"] = Field(
        "modality",
        description="what text and answers meet where media are routed: the weights of the "
        "medium that stands last before them (in a prompt without media, the merged weights); or "
        "always the merged weights",
    )


class EvaluationSettings(Part):
    """How the model is asked."""

    split: Literal["validation", "test"] = "test"
    references: bool = Field(
        True,
        description="also train and ask what FRG and retention compare with: naive fine-tunings "
        "and experts; a search on validation rows goes without",
    )
    joint: bool = Field(
        True, description="also ask questions about media of several modalities; a search does not"
    )
    batch_size: int = Field(128, ge=1)
    max_new_tokens: int = Field(24, ge=1)


class ExecutionSettings(Part):
    """Where and how wide a run executes; does not change what is computed."""

    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 ...")
    where: Literal["here", "workers"] = Field(
        "here", description="workers: steps go out to the machines of the Prefect work pool"
    )
    slots: int = Field(
        1, ge=1, description="steps at once; on CPU they share its cores, on one GPU they share it"
    )
    fine_tunings: int = Field(1, ge=1, description="how many of them may fine-tune: memory")
    processes: int = Field(1, ge=1, description="how many train one step together, a GPU each")
    shard: bool = Field(
        False, description="each of them holds a share of the weights (FSDP): for large backbones"
    )
    feature_shares: int = Field(
        1, ge=1, description="with workers: in how many shares they encode a modality's media"
    )


class Recipe(Part):
    """A whole run: data, model, method and how it is measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="folder under reports/")
    method: MethodName = Field("mera", description="how the model grows, or what is composed")
    seed: int = Field(0, ge=0, le=10**18, description="of all random choices")
    order: tuple[Modality, ...] = Field(
        min_length=1, description="modalities in the order in which they are learned"
    )
    modalities: dict[Modality, ModalitySettings]
    data: DataSettings = DataSettings()
    backbone: BackboneSettings = BackboneSettings()
    precision: Literal["bfloat16", "float32"] = Field(
        "bfloat16", description="of the weights on the disk"
    )
    align: PhaseSettings
    fine_tune: FineTuneSettings
    realign: RealignSettings
    replay: ReplaySettings
    merge: MergeSettings = MergeSettings()
    compose: ComposeSettings = ComposeSettings()
    rivals: RivalSettings = RivalSettings()
    correction: CorrectionSettings = CorrectionSettings()
    distil: DistilSettings = DistilSettings()
    mera_plus: MeraPlusSettings = MeraPlusSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    execution: ExecutionSettings = ExecutionSettings()
    estimate: EstimateSettings = EstimateSettings()
    methods: dict[MethodName, dict[str, Any]] = Field(
        default_factory=dict,
        exclude=True,
        description="method -> keys of this recipe that hold where it is the method: what was "
        "chosen for it alone",
    )
    store: Place = Field(
        "artifacts", description="folder of the artifact store, or s3://bucket/prefix"
    )

    _common: dict[str, Part] = PrivateAttr(default_factory=dict)

    def beside(self, common: Recipe) -> Recipe:
        """This recipe, which is another one with a method's own settings over it."""
        self._common = {name: getattr(common, name) for name in OWN}
        return self

    def common(self) -> Recipe:
        """This recipe as all methods share it: what gains are measured against learns by that."""
        return self.model_copy(update=self._common)

    def modality(self, name: str) -> ModalitySettings:
        """The settings of one modality by its name."""
        return {str(key): value for key, value in self.modalities.items()}[name]

    def kind_of(self, name: str) -> str:
        """What the rows of a modality hold: one of `KINDS`."""
        return self.modality(name).media or name

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Recipe:
        media = {str(name): settings.media for name, settings in self.modalities.items()}
        estimate = self.estimate
        assumed = {"rows": list(estimate.rows), "row_tokens": list(estimate.row_tokens)}
        problems = naming_problems(self.order, media, assumed)
        if self.method in ("ewc", "attention-only") and self.fine_tune.mode != "full":
            problems.append(f"{self.method} trains the LLM's own weights: set fine_tune.mode: full")
        if self.method == "experts" and not self.evaluation.references:
            problems.append("experts are the references: set evaluation.references: true")
        weighted = self.merge.coefficient is not None or self.merge.depth != 0.0
        if weighted and self.merge.rule != "running-average":
            problems.append("merge.coefficient and merge.depth need merge.rule: running-average")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def naming_problems(
    order: Sequence[str], media: Mapping[str, str | None], assumed: Mapping[str, Iterable[str]]
) -> list[str]:
    """Where a recipe's sections do not mean the same modalities, a line each.

    Args:
        order: the modalities to learn.
        media: modality -> what it says that its rows hold.
        assumed: key of `estimate` -> the modalities that it names.
    """
    problems, known = [], list(media)
    repeated = sorted({name for name in order if order.count(name) > 1})
    if repeated:
        problems.append(f"order names {', '.join(repeated)} more than once")
    for name, kind in media.items():
        if kind is None and name not in KINDS:
            problems.append(
                f"modalities.{name} does not say what its rows hold: add media: and one of "
                f"{', '.join(KINDS)}"
            )
        if name in RESERVED:
            problems.append(f"modalities.{name}: reports call something else so; rename it")
    missing = [name for name in order if name not in media]
    if missing:
        problems.append(
            f"order names {', '.join(missing)}, which modalities does not describe"
            f"{nearest(missing[0], known)}"
        )
    return problems + [
        f"estimate.{key}.{name}: modalities does not describe it{nearest(name, known)}"
        for key, names in assumed.items()
        for name in names
        if name not in media
    ]
