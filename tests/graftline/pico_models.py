"""Pico models of the classes that users bring, saved as the hub's folders are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VoxtralConfig,
    VoxtralEncoderConfig,
    VoxtralForConditionalGeneration,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

from graftline.model.backbone import load_backbone

WIDTH = 32
_TOWER = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_TEXT = {**_TOWER, "vocab_size": 99, "max_position_embeddings": 16, "projection_dim": 16}
_LLM = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
LLMS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "gemma": (GemmaConfig, GemmaForCausalLM, {"head_dim": 12}),
}


def _save(model: Any, folder: Path, *companions: Any) -> Path:
    model.save_pretrained(folder)
    for companion in companions:
        companion.save_pretrained(folder)
    return folder


def pico_clip(folder: Path, **vision: Any) -> Path:
    """CLIP, both towers: 3 x 3 patches and a class token of pictures of 24 x 24."""
    torch.manual_seed(0)
    tower = {**_TOWER, "image_size": 24, "patch_size": 8, "projection_dim": 16, **vision}
    config = CLIPConfig(text_config=_TEXT, vision_config=tower, projection_dim=16)
    size = {"height": 24, "width": 24}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size=size)
    return _save(CLIPModel(config), folder, processor)


def pico_siglip(folder: Path) -> Path:
    """SigLIP's vision model alone: 3 x 3 patches, no class token."""
    torch.manual_seed(0)
    config = SiglipVisionConfig(**_TOWER, image_size=24, patch_size=8)
    processor = SiglipImageProcessorPil(size={"height": 24, "width": 24})
    return _save(SiglipVisionModel(config), folder, processor)


def pico_whisper(folder: Path) -> Path:
    """Whisper for windows of two seconds: 100 positions."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=99, d_model=WIDTH, encoder_layers=2, decoder_layers=1, num_mel_bins=20,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, max_source_positions=100, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    extractor: Any = WhisperFeatureExtractor
    return _save(
        WhisperForConditionalGeneration(config),
        folder,
        extractor(feature_size=20, chunk_length=2),
    )


def pico_videomae(folder: Path) -> Path:
    """VideoMAE as it was pretrained, decoder and all: 4 frames of 16 x 16, 2 x 2 x 2 tubes."""
    torch.manual_seed(0)
    config = VideoMAEConfig(
        **_TOWER, image_size=16, patch_size=8, num_frames=4, tubelet_size=2,
        decoder_hidden_size=16, decoder_intermediate_size=16, decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
    )  # fmt: skip
    size = {"height": 16, "width": 16}
    processor = VideoMAEImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    return _save(VideoMAEForPreTraining(config), folder, processor)


def pico_llm(
    kind: str, folder: Path, tiny: Path, template: bool = False, pad: bool = False
) -> Path:
    """A causal LM of one of `LLMS` with the tiny model's tokenizer, as base models come.

    Args:
        kind: of `LLMS`.
        folder: to fill.
        tiny: the tiny backbone.
        template: whether the tokenizer keeps its chat template.
        pad: whether it keeps its padding token.
    """
    torch.manual_seed(0)
    config, model, own = LLMS[kind]
    tokenizer = load_backbone(tiny)[1]
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if not template:
        tokenizer.chat_template = None
    if not pad:
        tokenizer.pad_token = None
    sizes = {**_LLM, "vocab_size": len(tokenizer), **tokens, "pad_token_id": None, **own}
    return _save(model(config(**sizes)), folder, tokenizer)


def pickled(folder: Path, out: Path) -> Path:
    """A copy of a model whose weights are a pickle, as old ones are."""
    from safetensors.torch import load_file

    shutil.copytree(folder, out)
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    (out / "model.safetensors").unlink()
    return out


def pico_llava(folder: Path, tiny: Path, llm: Any = None) -> Any:
    """LLaVA with 2 x 2 patches of pictures of 8 x 8, the tiny model's tokenizer and template.

    Args:
        folder: to fill.
        tiny: the tiny backbone.
        llm: whose weights its LLM has; drawn ones if left out.

    Returns:
        The model.
    """
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    tokenizer = load_backbone(tiny)[1]
    config = LlavaConfig(vision_config=vision, text_config=_llama(tokenizer), image_token_index=299)
    size = {"height": 8, "width": 8}
    processor = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size=size)
    model = LlavaForConditionalGeneration(config).eval()
    if llm is not None:
        _give_llm(model, llm)
    _save(model, folder, tokenizer, processor)
    return model


def pico_voxtral(folder: Path, tiny: Path, llm: Any) -> Any:
    """Voxtral that hears windows of two seconds, around the LLM of `pico_llava`; see there."""
    torch.manual_seed(1)
    audio = VoxtralEncoderConfig(
        num_mel_bins=20, max_source_positions=100, num_hidden_layers=1, hidden_size=16,
        num_attention_heads=2, intermediate_size=64,
    )  # fmt: skip
    tokenizer = load_backbone(tiny)[1]
    text = _llama(tokenizer)
    config = VoxtralConfig(audio_config=audio, text_config=text, audio_token_id=299)
    model = VoxtralForConditionalGeneration(config).eval()
    _give_llm(model, llm)
    extractor: Any = WhisperFeatureExtractor
    _save(model, folder, tokenizer, extractor(feature_size=20, chunk_length=2))
    return model


def pico_base(folder: Path, tiny: Path) -> Any:
    """The LLM that `pico_llava` and `pico_voxtral` may be trained from."""
    torch.manual_seed(2)
    tokenizer = load_backbone(tiny)[1]
    model = LlamaForCausalLM(_llama(tokenizer)).eval()
    _save(model, folder, tokenizer)
    return model


def _give_llm(model: Any, llm: Any) -> None:
    model.model.language_model.load_state_dict(llm.model.state_dict())
    model.lm_head.load_state_dict(llm.lm_head.state_dict())


def _llama(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        **_LLM, vocab_size=300, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, head_dim=12,
    )  # fmt: skip
