"""Recipe parts that name the user's own models: encoders, a backbone, and what a plan assumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from graftline.recipe_parts import Part, Place, Split

StarterBackbone = Literal["smollm2-135m-instruct", "tiny-random"]
HUB_NAME = r"^[A-Za-z0-9][\w.-]*/[\w.-]+$"


class Pretrained(Part):
    """Weights of the user's own: a hub name with a pinned revision, or a local folder."""

    name: str | None = Field(None, pattern=HUB_NAME, description="hub name, organisation/model")
    revision: str | None = Field(None, description="40 hexadecimal digits of the hub's commit")
    folder: Place | None = Field(None, description="local `transformers` folder")

    def places(self) -> list[str]:
        """The keys that say where the weights are, as far as they are given."""
        return [key for key in ("name", "folder") if getattr(self, key) is not None]

    @model_validator(mode="after")
    def _one_place(self) -> Pretrained:
        given = self.places()
        if len(given) != 1:
            raise ValueError(
                f"say in one way where the weights are, name (with revision) or folder; given: "
                f"{', '.join(given) or 'nothing'}"
            )
        if self.revision is not None and self.name is None:
            raise ValueError("revision belongs to a hub name; a local folder has none")
        return self


class EncoderSize(Part):
    """What a plan assumes of an encoder that is not here yet; changes no result."""

    parameters: int = Field(ge=0, description="of the tower that is used")
    positions: int = Field(ge=1, description="that one medium has inside the encoder")
    width: int = Field(ge=1, description="of a token")


class TransformersEncoder(Pretrained):
    """A frozen encoder of `transformers`: its `AutoModel`, and of several towers the media's."""

    source: Literal["transformers"]
    layer: int | None = Field(
        None, description="which hidden state, as in `hidden_states[layer]`; the last if left out"
    )
    pooling: Literal["all", "patches", "first", "mean"] = Field(
        "all",
        description="all: every position; patches: all but the first (the class token); first: it "
        "alone; mean: one token, the mean of all",
    )
    tokens: int | None = Field(
        None, ge=1, description="average neighbouring positions down to this many tokens"
    )
    frames: int | None = Field(
        None, ge=1, description="of a video, evenly spread, where the encoder sees single pictures"
    )
    seconds: float | None = Field(
        None, gt=0.0, description="sounds are cut, or filled with silence, to this length"
    )
    trust_remote_code: bool = Field(
        False, description="run the model's own Python; GRAFTLINE_TRUST_REMOTE_CODE=1 must agree"
    )
    expected: EncoderSize | None = None


class TimmEncoder(Pretrained):
    """A frozen picture encoder of timm, in the layout of the hub's `timm/...`."""

    source: Literal["timm"]
    layer: int | None = Field(
        None, description="which block's output, -2: the last but one; the model's own if left out"
    )
    pooling: Literal["all", "patches", "mean"] = Field(
        "patches",
        description="all: every position; patches: places of the picture; mean: one token",
    )
    tokens: int | None = Field(
        None, ge=1, description="average neighbouring positions down to this many tokens"
    )
    frames: int | None = Field(None, ge=1, description="of a video, evenly spread")
    expected: EncoderSize | None = None


class FeatureRows(Part):
    """No encoder: rows hold float arrays (tokens, width) that a sensor or another model made."""

    source: Literal["features"]
    tokens: int | None = Field(
        None, ge=1, description="average neighbouring tokens down to this many"
    )
    width: int | None = Field(None, ge=1, description="that every row must have")


class PythonEncoder(Part):
    """An encoder class of an installed package."""

    source: Literal["python"]
    python: str = Field(
        min_length=1, description="package.module:Class, or a name of the group graftline.encoders"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="arguments of the class")
    expected: EncoderSize | None = None


OwnEncoder = TransformersEncoder | TimmEncoder | FeatureRows | PythonEncoder
ENCODER_PARTS: Mapping[str, type[Part]] = {
    "[transformers]": TransformersEncoder,
    "[timm]": TimmEncoder,
    "[features]": FeatureRows,
    "[python]": PythonEncoder,
}


def _encoder_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "[name]"
    source = value.get("source") if isinstance(value, Mapping) else getattr(value, "source", None)
    return f"[{source}]" if f"[{source}]" in ENCODER_PARTS else None


EncoderChoice = Annotated[
    Annotated[str, Tag("[name]")]
    | Annotated[TransformersEncoder, Tag("[transformers]")]
    | Annotated[TimmEncoder, Tag("[timm]")]
    | Annotated[FeatureRows, Tag("[features]")]
    | Annotated[PythonEncoder, Tag("[python]")],
    Discriminator(
        _encoder_tag,
        custom_error_type="encoder_source",
        custom_error_message="write the name of a starter's encoder, or a mapping with source: "
        "transformers, timm, features or python (docs/models.md)",
    ),
]


class BackboneSource(Pretrained):
    """An LLM of the user's own: any `AutoModelForCausalLM` with safetensors weights, or a GGUF."""

    gguf: Place | None = Field(None, description="a GGUF file, converted once")

    def places(self) -> list[str]:
        """The keys that say where the weights are, as far as they are given."""
        return [*super().places(), *(["gguf"] if self.gguf is not None else [])]


def _spelled_out(value: Any) -> Any:
    """`organisation/model@commit`, a path that begins with `.`, `/` or `~`, or a `.gguf` file."""
    if not isinstance(value, str) or ("/" not in value and not value.endswith(".gguf")):
        return value
    if value.endswith(".gguf"):
        return {"gguf": value}
    if value[0] in "./~":
        return {"folder": value}
    name, _, revision = value.partition("@")
    return {"name": name, "revision": revision or None}


BackboneChoice = Annotated[
    Annotated[StarterBackbone, Tag("[name]")] | Annotated[BackboneSource, Tag("[own]")],
    Discriminator(lambda value: "[name]" if isinstance(value, str) else "[own]"),
    BeforeValidator(_spelled_out),
]


TAGGED: Mapping[str, type[Part]] = {**ENCODER_PARTS, "[own]": BackboneSource}
"""Tag in an error's location -> the part that it stands for."""


class BackboneSize(Part):
    """Sizes by the names of `config.json`, for a plan before the weights are here."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int | None = Field(None, ge=1)
    head_dim: int | None = Field(None, ge=1)
    tie_word_embeddings: bool = False


class ConnectorSettings(Part):
    """Shape of a connector: features of one medium to LLM input embeddings."""

    tokens: int = Field(4, ge=1, le=1024, description="LLM input embeddings a medium becomes")
    hidden: int = Field(512, ge=1, description="width of the hidden layer")
    kind: Literal["mlp", "linear", "resampler"] = Field(
        "mlp", description="linear: no hidden layer; resampler: learned queries read the tokens"
    )
    layers: int = Field(2, ge=1, le=64, description="of a resampler")
    heads: int = Field(8, ge=1, description="of a resampler; they divide hidden")

    @model_validator(mode="after")
    def _heads_divide(self) -> ConnectorSettings:
        if self.kind == "resampler" and self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is no multiple of heads {self.heads}")
        return self


class EstimateSettings(Part):
    """What `graftline plan` assumes where nothing is there to be measured; changes no result."""

    teraflops: float | None = Field(
        None, gt=0.0, description="TFLOP/s that one GPU sustains; gives GPU hours"
    )
    rows: dict[str, dict[Split, PositiveInt]] = Field(
        default_factory=dict, description="modality -> split -> rows"
    )
    row_tokens: dict[str, PositiveFloat] = Field(
        default_factory=dict, description="modality -> tokens of a row, medium and text"
    )


STARTERS: Mapping[str, str] = {
    "image": "efficientnet-lite0",
    "audio": "whisper-tiny.en",
    "video": "efficientnet-lite0-frames",
    "point_cloud": "basis-point-set",
}
"""Kind of media -> the starter's encoder, which a new recipe takes; features need none."""
