"""Grouped attention against the eager implementation of `transformers`."""

import json
from pathlib import Path

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from graftline.model.attention import GROUPED, attention_for, grouped_attention, register
from graftline.model.backbone import load_backbone
from graftline.model.opening import open_backbone


def _logits(attention: str, heads: int, key_heads: int) -> torch.Tensor:
    register()
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        attn_implementation=attention,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    tokens = torch.arange(20).view(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # padding on the left
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=mask).logits[:, 3:]


@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4), (4, 1)])
def test_grouped_attention_is_eager_attention(heads: int, key_heads: int) -> None:
    grouped = _logits(GROUPED, heads, key_heads)
    torch.testing.assert_close(grouped, _logits("eager", heads, key_heads), rtol=1e-5, atol=1e-6)


def test_a_query_meets_its_own_groups_key() -> None:
    """Worked example: four heads, two keys; the key that a query is like gives its value."""
    keys = torch.tensor([[[[9.0, 0.0], [0.0, 9.0]], [[0.0, 9.0], [9.0, 0.0]]]])
    values = torch.tensor([[[[1.0], [2.0]], [[3.0], [4.0]]]])
    query = torch.tensor([9.0, 0.0]).expand(1, 4, 1, 2)
    mixed, weights = grouped_attention(torch.nn.Identity(), query, keys, values, None, 1.0)
    assert mixed.flatten().tolist() == [1.0, 1.0, 4.0, 4.0]
    assert weights.shape == (1, 4, 1, 2)


@pytest.mark.parametrize(
    ("kind", "device", "expected"),
    [
        ("llama", "cpu", GROUPED),
        ("llama", "cuda", "sdpa"),
        ("gemma2", "cpu", "eager"),
        (None, "cpu", "eager"),
    ],
)
def test_auto_is_known_to_be_right_or_eager(
    tmp_path: Path, kind: str | None, device: str, expected: str
) -> None:
    if kind is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    assert attention_for(tmp_path, device) == expected


@pytest.mark.parametrize(
    ("kind", "chosen"), [("llama", "sdpa"), ("gemma2", "eager")], ids=["with-sdpa", "without"]
)
def test_a_gpu_takes_its_kernel_where_the_architecture_has_one(
    kind: str, chosen: str, tmp_path: Path, tiny_folder: Path
) -> None:
    """What `auto` asks for on a GPU, placed on CPU: the kernel exists on both."""
    folder = tiny_folder if kind == "llama" else _gemma2(tiny_folder, tmp_path / "gemma2")
    model, _ = open_backbone(folder, "float32", "auto", "cuda", place="cpu")
    assert model.config._attn_implementation == chosen
    tokens = torch.arange(20).view(2, 10)
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0  # padding on the left
    plain, _ = load_backbone(folder, torch.float32, "eager")
    with torch.inference_mode():
        found, wanted = (
            each(input_ids=tokens, attention_mask=mask).logits[:, 3:] for each in (model, plain)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def _gemma2(tiny: Path, folder: Path) -> Path:
    """A small LLM with soft caps, which SDPA cannot compute."""
    tokenizer = load_backbone(tiny)[1]
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    torch.manual_seed(0)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
