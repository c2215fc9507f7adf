"""Pico models of `transformers`, taken apart and put together again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.configuration_qwen2_vl import (
    Qwen2VLTextConfig,
    Qwen2VLVisionConfig,
)

from graftline.asking.asker import Asker
from graftline.asking.bundle import read_bundle, read_description
from graftline.asking.conversation import Turn
from graftline.asking.parts import load_parts
from graftline.errors import GraftlineError
from graftline.exchange.taking_apart import PARTS, Recombined, drawn_inputs, take_apart
from graftline.model.backbone import load_backbone, make_tiny
from graftline.model.own_backbone import PLAIN_TEMPLATE
from tests.graftline.pico_models import pico_llava

TEXT = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SAME = {"rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2}  # else by the model's type
AUDIO = {
    "num_mel_bins": 8, "max_source_positions": 8, "encoder_layers": 1, "d_model": 16,
    "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
}  # fmt: skip


def _llava(**changes):
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**TEXT), image_token_index=299, **changes
    )
    return LlavaForConditionalGeneration(config)


def _voxtral():
    audio = VoxtralEncoderConfig(
        num_mel_bins=8, max_source_positions=8, num_hidden_layers=1, hidden_size=16,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    text = LlamaConfig(**TEXT, head_dim=8)
    return VoxtralForConditionalGeneration(
        VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=299)
    )


def _qwen2_audio():
    text = Qwen2Config(**TEXT)
    audio = Qwen2AudioEncoderConfig(**AUDIO)
    return Qwen2AudioForConditionalGeneration(
        Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=299)
    )


MODELS = {
    "llava": _llava,
    "llava, two layers, class token": lambda: _llava(
        vision_feature_layer=[-3, -1], vision_feature_select_strategy="full"
    ),
    "llava, tied": lambda: _llava(tie_word_embeddings=True),
    "voxtral": _voxtral,
    "qwen2-audio": _qwen2_audio,
}


def _stirred(model):
    """Initial weights are so small that a mistake would hardly show."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _saved(name, folder):
    torch.manual_seed(0)
    model = _stirred(MODELS[name]().eval())
    model.save_pretrained(folder)
    make_tiny(folder.parent / "tokenizer", seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        file = folder.parent / "tokenizer" / name
        (folder / name).write_bytes(file.read_bytes())
    (folder / "preprocessor_config.json").write_text("{}")
    return model


def _named(parts, media):
    if parts.joint.modality == "image":
        return {"pixel_values": media}
    named = {"input_features": media}
    if parts.joint.model_type == "qwen2_audio":
        named["feature_attention_mask"] = torch.ones(len(media), media.shape[-1], dtype=torch.long)
    return named


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_say_what_the_whole_says(name, tmp_path):
    model = _saved(name, tmp_path / "whole")
    take_apart(tmp_path / "whole", tmp_path / "parts")
    parts = Recombined(tmp_path / "parts")
    token_ids, media = drawn_inputs(model.config, parts)
    media = media.flip(0) * 0.5  # not what was compared while it was taken apart
    with torch.inference_mode():
        mask = torch.ones_like(token_ids)
        whole = model(input_ids=token_ids, attention_mask=mask, **_named(parts, media)).logits
    found = parts.logits(token_ids, media)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4)
    assert (parts.logits(token_ids, -media) - whole).abs().max() > 1e-2
    backbone, tokenizer = load_backbone(tmp_path / "parts/backbone", torch.float32)
    expected = model.get_input_embeddings().weight
    assert backbone.get_input_embeddings().weight.equal(expected)
    assert tokenizer.decode([5])
    assert (tmp_path / "parts/encoder/preprocessor_config.json").is_file()
    with pytest.raises(GraftlineError, match="is there already"):
        take_apart(tmp_path / "whole", tmp_path / "parts")


def test_parts_that_say_something_else_are_not_written(tmp_path, monkeypatch):
    _saved("llava", tmp_path / "whole")
    right = Recombined.features
    monkeypatch.setattr(Recombined, "features", lambda self, media: right(self, media).flip(1))
    with pytest.raises(GraftlineError, match="logits differ by"):
        take_apart(tmp_path / "whole", tmp_path / "parts")
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "tokenizer"}


def test_other_folders_are_refused(tmp_path):
    make_tiny(tmp_path / "llama", seed=0)
    with pytest.raises(GraftlineError, match="type 'llama'; llava, qwen2_audio, voxtral"):
        take_apart(tmp_path / "llama", tmp_path / "parts")
    with pytest.raises(GraftlineError, match="there is no such folder"):
        take_apart(tmp_path / "absent", tmp_path / "parts")
    _saved("llava", tmp_path / "whole")
    config = json.loads((tmp_path / "whole/config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    with pytest.raises(GraftlineError, match="do not belong to config.json"):
        take_apart(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / PARTS).exists()


def test_pickled_weights_are_refused_and_no_code_is_asked_for(tmp_path):
    _saved("llava", tmp_path / "whole")
    (weights,) = (tmp_path / "whole").glob("*.safetensors")
    torch.save(load_file(weights), tmp_path / "whole/pytorch_model.bin")
    weights.unlink()
    with pytest.raises(GraftlineError, match="pickled weights only"):
        take_apart(tmp_path / "whole", tmp_path / "parts")
    config = {"model_type": "other", "auto_map": {"AutoConfig": "code.Configuration"}}
    (tmp_path / "whole/config.json").write_text(json.dumps(config))
    (tmp_path / "whole/model.safetensors").touch()
    with pytest.raises(GraftlineError, match="trust_remote_code"):
        take_apart(tmp_path / "whole", tmp_path / "parts")


def test_positions_on_three_axes_are_refused_because_a_plain_backbone_has_one(tmp_path):
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = Qwen2VLVisionConfig(depth=1, embed_dim=16, hidden_size=32, num_heads=2, patch_size=4)
    text = Qwen2VLTextConfig(**TEXT, **SAME, rope_parameters=rope)
    config = Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=299)
    whole = _stirred(Qwen2VLForConditionalGeneration(config).eval())
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(GraftlineError, match="three axes"):
        take_apart(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    plain = Qwen2ForCausalLM(Qwen2Config(**TEXT, **SAME, rope_theta=1e4)).eval()
    plain.model.load_state_dict(whole.model.language_model.state_dict())
    plain.lm_head.load_state_dict(whole.lm_head.state_dict())
    along = torch.arange(6).expand(3, 1, 6)  # text: all axes alike
    picture = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])[:, None]
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.inference_mode():
        alone = plain(ids).logits
        told, shown = (whole(ids, position_ids=where).logits for where in (along, picture))
    torch.testing.assert_close(told, alone)
    assert (shown - alone).abs().max() > 0.1


def test_what_was_taken_apart_is_a_model_that_can_be_asked(tmp_path):
    make_tiny(tmp_path / "tiny", seed=0)
    model = pico_llava(tmp_path / "whole", tmp_path / "tiny")
    take_apart(tmp_path / "whole", tmp_path / "made")
    (tmp_path / "made").rename(tmp_path / "elsewhere")  # its encoder is found from its own folder
    parts = read_bundle(tmp_path / "elsewhere")
    picture = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    asker = Asker(parts)
    medium = asker.read(tmp_path / "picture.png", "image")
    [shown] = asker.show([medium], [tmp_path / "picture.png"])
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path / "whole")
    pixels = processor([picture], return_tensors="pt", input_data_format="channels_last")
    with torch.inference_mode():
        loaded = load_parts(parts)
        found = loaded.model.connectors["image"](shown.features[None].float())
        wanted = model.get_image_features(**pixels).pooler_output
    wanted = torch.stack(list(wanted)).flatten(0, 1)
    # features are rounded to float16, as cached ones are
    torch.testing.assert_close(found[0], wanted, rtol=2e-3, atol=2e-3)
    assert isinstance(asker.answer([[Turn((shown,), "What is this?")]])[0], str)
    described = read_description(tmp_path / "elsewhere")
    assert (described.stage, described.order, described.method) == (1, ("image",), "taken-apart")
    assert "taken-apart: not trained here" in (tmp_path / "elsewhere/README.md").read_text()
    weights = tmp_path / "elsewhere/connectors/connector-image.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(GraftlineError, match="connector-image.safetensors"):
        read_bundle(tmp_path / "elsewhere")


TYPED = (
    "{% for message in messages %}{{ message['role'] }}:"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""As the hub's LLaVA models have it: a turn that is a string is rendered as nothing."""


@pytest.mark.parametrize("typed", [True, False])
def test_a_chat_template_that_loses_plain_turns_is_replaced(typed, tmp_path, caplog):
    make_tiny(tmp_path / "tiny", seed=0)
    pico_llava(tmp_path / "whole", tmp_path / "tiny")
    kept = load_backbone(tmp_path / "tiny")[1].chat_template
    if typed:
        (tmp_path / "whole/chat_template.jinja").write_text(TYPED)
    take_apart(tmp_path / "whole", tmp_path / "made")
    found = load_backbone(tmp_path / "made/backbone")[1].chat_template
    assert found == (PLAIN_TEMPLATE if typed else kept)
    assert ("takes no plain text" in caplog.text) == typed
    asker = Asker(read_bundle(tmp_path / "made"))
    assert isinstance(asker.answer([[Turn((), "What is this?")]])[0], str)
