"""A finished multimodal model of `transformers`, taken apart: backbone, encoder, connector.

Models in LLaVA's layout (Liu et al., arXiv 2304.08485) keep an encoder, a projector and an LLM in
one folder. Apart, the LLM is a plain backbone that `graftline merge` reads, the encoder a plain
encoder, and the connector a few matrices. What was taken apart is put together again from the new
folder, and must say the same as the whole. The new folder is a model like an exported one: it can
be asked, and `graftline add` grows it by one more modality.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftline import durable
from graftline.asking.bundle import (
    INSIDE,
    TAKEN_APART,
    Description,
    EncoderDescription,
    refuse_existing,
    sealed_as,
    write_description,
)
from graftline.asking.card import model_card
from graftline.encoders import describe_encoder
from graftline.errors import GraftlineError
from graftline.manifest import FORMAT, fingerprint_of, seal
from graftline.model.building import BUILDING
from graftline.model.connector_kinds import register
from graftline.model.loading import ConnectorRecord, read_connector, read_record, save_connector
from graftline.model.own_backbone import PLAIN_TEMPLATE
from graftline.model.pretrained import require_safetensors
from graftline.model.projector import projector_shape
from graftline.model.prompts import PromptEncoder
from graftline.settings.models import TransformersEncoder

register()
PARTS, CONNECTORS = "parts.json", "connectors"
LONGEST_ANSWER = 64
"""Tokens of an answer; a model that was taken apart has no recipe that says it."""
_log = logging.getLogger(__name__)
TOLERANCE = 1e-4
"""Largest difference of logits, as a share of the largest logit: other kernels round otherwise."""
_MODELS = {
    "llava": ("LlavaForConditionalGeneration", "vision_tower"),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", "audio_tower"),
    "voxtral": ("VoxtralForConditionalGeneration", "audio_tower"),
}
"""Model type -> its class, and the name of its encoder there."""
_PREPROCESSING = ("preprocessor_config.json", "processor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")
_OWN = ("config.json", "generation_config.json", "README.md", "manifest.json")


@dataclass(frozen=True)
class Joint:
    """How encoder, connector and backbone go together.

    Attributes:
        model_type: of the whole, in `transformers`.
        modality: image or audio.
        token_id: the token in whose places the medium's embeddings stand.
        layers: hidden states of the encoder that the connector sees together; none: its output.
        skip: encoder tokens left out at the front of each layer (the class token).
        group: encoder tokens that become one.
        activation: between the connector's two layers, by `transformers`' name; None: one layer.
    """

    model_type: str
    modality: str
    token_id: int
    layers: tuple[int, ...] = ()
    skip: int = 0
    group: int = 1
    activation: str | None = None


class Recombined:
    """A model that was taken apart, put together from its three parts.

    Args:
        folder: what `take_apart` made; it is computed in float32.
    """

    def __init__(self, folder: Path) -> None:
        with BUILDING:
            from transformers import AutoModel, AutoModelForCausalLM

            content = json.loads((folder / PARTS).read_text(encoding="utf-8"))
            self.joint = Joint(**{**content["joint"], "layers": tuple(content["joint"]["layers"])})
            causal: Any = AutoModelForCausalLM
            encoder: Any = AutoModel
            given = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
            self.backbone = causal.from_pretrained(folder / "backbone", **given).eval()
            self.encoder = encoder.from_pretrained(folder / "encoder", **given).eval()
        record = read_record(folder / CONNECTORS, self.joint.modality)
        self.connector = read_connector(folder / CONNECTORS, record)

    @torch.inference_mode()
    def logits(self, token_ids: Tensor, media: Tensor) -> Tensor:
        """What the model would say next, at every place.

        Args:
            token_ids: int64 (batch, length); `joint.token_id` where a medium's embeddings stand.
            media: what the encoder takes, (media, ...), in reading order.

        Returns:
            (batch, length, vocabulary).

        Raises:
            GraftlineError: the media do not fill their places exactly.
        """
        vectors = self.connector(self.features(media)).flatten(0, 1)
        embeddings = self.backbone.get_input_embeddings()(token_ids)
        places = token_ids == self.joint.token_id
        if int(places.sum()) != len(vectors):
            raise GraftlineError(f"{int(places.sum())} places for {len(vectors)} embeddings")
        filled = embeddings.masked_scatter(places.unsqueeze(-1), vectors.to(embeddings.dtype))
        found: Tensor = self.backbone(inputs_embeds=filled, use_cache=False).logits
        return found

    def features(self, media: Tensor) -> Tensor:
        """What the encoder says of media: (media, tokens, width)."""
        return _features(self.encoder, self.joint, media)


def _features(encoder: Any, joint: Joint, media: Tensor) -> Tensor:
    if not joint.layers:
        output: Tensor = encoder(media).last_hidden_state
        return output
    states = encoder(media, output_hidden_states=True).hidden_states
    return torch.cat([states[layer][:, joint.skip :] for layer in joint.layers], -1)


def take_apart(folder: Path, out: Path) -> float:
    """Writes a model's backbone, encoder and connector into folders of their own.

    `out` gets `backbone/` (a causal LM with the tokenizer), `encoder/` (with what prepares its
    media), `connectors/` and `parts.json`, and is a model as `graftline export` writes them, unless
    its connector reads several layers at once, which no recipe can say; then it is the parts alone.
    It appears whole or not at all, and only if the parts together give the whole's logits.

    Args:
        folder: a `transformers` folder of type llava, qwen2_audio or voxtral.
        out: folder to make.

    Returns:
        The largest difference between the two models' logits on drawn inputs.

    Raises:
        GraftlineError: the folder cannot be read or is of another type, `out` is there, or the
            parts say something else than the whole.
    """
    refuse_existing(out)
    joint, model, precision = _opened(folder)
    with durable.new_folder(out) as temporary:
        _write_parts(model, joint, folder, temporary)
        difference = _compare(model, Recombined(temporary), folder)
        content = {"joint": asdict(joint), "from": folder.name, "difference": difference}
        (temporary / PARTS).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        seal(temporary, _sealed_as(temporary, joint, folder.name, precision, content))
    return difference


def _sealed_as(
    out: Path, joint: Joint, called: str, precision: str, content: Mapping[str, Any]
) -> dict[str, Any]:
    """What the manifest says; writes what the model is, if a recipe can say how it encodes."""
    if len(joint.layers) > 1:
        step = {"format": FORMAT, "kind": "parts", "parameters": content, "parents": {}}
        fingerprint = fingerprint_of("parts", parameters=content, parents={}, code="")
        return {**step, "fingerprint": fingerprint, "code": ""}
    description = _described(out, joint, called, precision)
    write_description(out, description, model_card(description, None))
    return sealed_as(description)


def _described(out: Path, joint: Joint, called: str, precision: str) -> Description:
    settings = {
        "source": "transformers",
        "folder": str(out / "encoder"),
        "layer": joint.layers[0] if joint.layers else None,
        "pooling": "patches" if joint.skip else "all",
    }
    encoder = describe_encoder(TransformersEncoder.model_validate(settings), joint.modality)
    inside = {"folder": f"{INSIDE}encoder"}
    own = {key: {**encoder[key], **inside} for key in ("settings", "weights")}
    return Description(
        recipe=called,
        method=TAKEN_APART,
        seed=0,
        stage=1,
        order=(joint.modality,),
        data_md5="",
        run_fingerprint="",
        backbone=called,
        backbone_part=None,
        encoders={
            joint.modality: EncoderDescription(
                name="transformers:encoder",
                sha256=encoder["sha256"],
                part=None,
                own={"media": joint.modality, **own},
            )
        },
        experts=(),
        adapters=(),
        masked=False,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        attention="auto",
        system_prompt="",
        text="merged",
        max_new_tokens=LONGEST_ANSWER,
    )


def _opened(folder: Path) -> tuple[Joint, Any, str]:
    """How a folder's parts go together, the whole model in float32, and its weights' own dtype."""
    if not folder.is_dir():
        raise GraftlineError(f"{folder}: there is no such folder")
    require_safetensors(folder)
    with BUILDING:
        import transformers

    library: Any = transformers
    given = {"local_files_only": True, "trust_remote_code": False}
    try:
        config: Any = library.AutoConfig.from_pretrained(str(folder), **given)
    except Exception as error:
        raise GraftlineError(f"{folder}: not a readable `transformers` folder ({error})") from error
    if _has_axes(config):
        raise GraftlineError(
            f"{folder}: {config.model_type!r} gives media positions on three axes (M-RoPE), which "
            "a plain causal LM does not have: its parts would not say what the whole says"
        )
    if config.model_type not in _MODELS:
        raise GraftlineError(
            f"{folder}: is of type {config.model_type!r}; {', '.join(_MODELS)} can be taken apart"
        )
    auto: Any = getattr(library, _MODELS[config.model_type][0])
    try:
        with BUILDING:
            model, found = auto.from_pretrained(
                str(folder),
                dtype=torch.float32,
                use_safetensors=True,
                output_loading_info=True,
                **given,
            )
    except Exception as error:
        raise GraftlineError(f"{folder}: its weights cannot be read ({error})") from error
    wrong = {key: sorted(names) for key, names in found.items() if names}
    if wrong:
        raise GraftlineError(f"{folder}: its weights do not belong to config.json: {wrong}")
    return _joint(config), model.eval(), str(config.dtype or "").removeprefix("torch.")


def _has_axes(config: Any) -> bool:
    """Whether positions are time, row and column, as in Qwen2-VL (arXiv 2409.12191)."""
    text = getattr(config, "text_config", config)
    return "mrope_section" in (getattr(text, "rope_parameters", None) or {})


def _joint(config: Any) -> Joint:
    if config.model_type == "llava":
        layer = config.vision_feature_layer
        return Joint(
            "llava",
            "image",
            config.image_token_id,
            layers=tuple(layer) if isinstance(layer, list) else (layer,),
            skip=1 if config.vision_feature_select_strategy == "default" else 0,
            activation=config.projector_hidden_act,
        )
    if config.model_type == "voxtral":
        width = config.audio_config.hidden_size
        return Joint(
            "voxtral",
            "audio",
            config.audio_token_id,
            group=config.audio_config.intermediate_size // width,
            activation=config.projector_hidden_act,
        )
    return Joint("qwen2_audio", "audio", config.audio_token_id)


def _write_parts(model: Any, joint: Joint, folder: Path, out: Path) -> None:
    with BUILDING:
        from transformers import AutoModelForCausalLM

        causal: Any = AutoModelForCausalLM
        backbone = causal.from_config(model.config.text_config)
    state = {f"model.{k}": v for k, v in model.model.language_model.state_dict().items()}
    state["lm_head.weight"] = model.lm_head.weight
    backbone.load_state_dict(state, strict=True)
    backbone.save_pretrained(out / "backbone")
    tower = getattr(model.model, _MODELS[joint.model_type][1])
    tower.save_pretrained(out / "encoder")
    (out / PARTS).write_text(json.dumps({"joint": asdict(joint)}), encoding="utf-8")
    weights = model.model.multi_modal_projector.state_dict()
    with torch.inference_mode():
        tokens = _features(tower, joint, _drawn_media(model.config, joint.modality)).shape[1]
    shape = projector_shape(weights, tokens, joint.group, joint.activation)
    record = ConnectorRecord(joint.modality, shape, "the backbone that it was found with")
    connector = record.build()
    connector.load_state_dict(weights, strict=True)
    (out / CONNECTORS).mkdir()
    save_connector(out / CONNECTORS, record, connector)
    for file in sorted(folder.iterdir()):
        if file.is_file() and not file.name.endswith(_WEIGHTS) and file.name not in _OWN:
            place = "encoder" if file.name in _PREPROCESSING else "backbone"
            shutil.copyfile(file, out / place / file.name)
    _give_template(out / "backbone")


def _give_template(backbone: Path) -> None:
    """A plain chat template where the model's own is lost, or takes typed parts for a turn."""
    with BUILDING:
        from transformers import AutoTokenizer
    if not (backbone / "tokenizer_config.json").is_file():
        return  # there is no tokenizer; who asks the backbone is told so
    tokenizer = AutoTokenizer.from_pretrained(
        str(backbone), local_files_only=True, trust_remote_code=False
    )
    try:
        PromptEncoder(tokenizer, {}).encode(["a turn"])
    except GraftlineError:
        for name in ("chat_template.jinja", "chat_template.json"):
            (backbone / name).unlink(missing_ok=True)
        tokenizer.chat_template = PLAIN_TEMPLATE
        tokenizer.save_pretrained(backbone)
        _log.warning(
            "the model's chat template takes no plain text; its backbone got a plain one of USER "
            "and ASSISTANT, a line each"
        )


def _compare(model: Any, parts: Recombined, folder: Path) -> float:
    """The largest difference of the two models' logits on two prompts with a drawn medium each."""
    token_ids, media = drawn_inputs(model.config, parts)
    named: dict[str, Tensor] = {"pixel_values": media}
    if parts.joint.modality == "audio":
        named = {"input_features": media}
    if parts.joint.model_type == "qwen2_audio":
        named["feature_attention_mask"] = torch.ones(len(media), media.shape[-1], dtype=torch.long)
    with torch.inference_mode():
        whole = model(input_ids=token_ids, attention_mask=torch.ones_like(token_ids), **named)
    found = parts.logits(token_ids, media)
    difference = float((found - whole.logits).abs().max())
    if not difference <= TOLERANCE * float(whole.logits.abs().max()):
        raise GraftlineError(
            f"{folder}: its parts together do not say what the whole says (logits differ by "
            f"{difference:.3g}); this version of Graftline does not know this layout"
        )
    return difference


def drawn_inputs(config: Any, parts: Recombined) -> tuple[Tensor, Tensor]:
    """Two prompts of one length with a medium each, drawn from a fixed seed.

    Args:
        config: of the whole model.
        parts: tells how many places a medium fills.

    Returns:
        Token ids (2, length), and media as the encoder takes them.
    """
    media = _drawn_media(config, parts.joint.modality)
    places = parts.connector.tokens
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(0, config.text_config.vocab_size, (2, 8), generator=generator)
    words[words == parts.joint.token_id] = (
        parts.joint.token_id + 1
    ) % config.text_config.vocab_size
    slots = torch.full((2, places), parts.joint.token_id)
    return torch.cat([words[:, :4], slots, words[:, 4:]], 1), media


def _drawn_media(config: Any, modality: str) -> Tensor:
    """Two media as the encoder takes them, of normal numbers from a fixed seed."""
    if modality == "image":
        side = config.vision_config.image_size
        shape: tuple[int, ...] = (2, config.vision_config.num_channels, side, side)
    else:
        audio = config.audio_config
        shape = (2, audio.num_mel_bins, 2 * audio.max_source_positions)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))
