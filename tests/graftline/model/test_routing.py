"""A routed model against its modalities' dense models, token by token."""

from __future__ import annotations

import copy
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graftline.model import products
from graftline.model.multimodal import Batch, collate
from graftline.model.prompts import MediaSlot
from graftline.model.routing import (
    DenseWeight,
    MaskedWeight,
    RoutedLinear,
    routable_parameters,
    route_backbone,
    routed,
    unroute_backbone,
)
from graftline.model.routing.layers import STREAMED
from tests.graftline.model.routing_setting import (
    CLOSE,
    MIXED,
    Setting,
    dense,
    generate,
    logits,
)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", ["audio", "video"])
def test_with_text_as_the_modality_it_is_that_modalitys_dense_model(setting, name, cache) -> None:
    number = setting.model.modality_numbers[name]
    expected_model = setting.alone(number).model
    batch = setting.batch((name, "What?"), ("A longer one:", name, name, "Tell me."))
    expected, answers = logits(expected_model, batch), generate(expected_model, batch)
    assert not torch.allclose(logits(setting.model, batch), expected, **CLOSE)
    route_backbone(setting.backbone, setting.variants, text="modality", cache=cache)
    torch.testing.assert_close(logits(setting.model, batch), expected, **CLOSE)
    assert torch.equal(generate(setting.model, batch), answers)


@pytest.mark.parametrize("text", ["merged", "modality"])
def test_every_token_meets_its_own_weights_and_no_others(setting, text) -> None:
    """Against computing every variant for every token and picking, layer by layer (DAMC)."""
    batch = setting.batch(*MIXED)
    route_backbone(setting.backbone, setting.variants, text=text)
    got = logits(setting.model, batch)
    unroute_backbone(setting.backbone)
    ids = batch.modality_ids if text == "merged" else read_on(batch.modality_ids)
    with picking(setting.backbone, setting.variants, ids):
        torch.testing.assert_close(got, logits(setting.model, batch), **CLOSE)


def read_on(modality_ids: torch.Tensor) -> torch.Tensor:
    """Token by token: text belongs to the medium last read, and before all to the first."""
    rows = []
    for row in modality_ids.tolist():
        own = next((each for each in row if each), 0)
        found = []
        for each in row:
            own = each or own
            found.append(own)
        rows.append(found)
    return torch.tensor(rows)


@contextmanager
def picking(backbone, variants, modality_ids: torch.Tensor):
    """Every routed layer computes all variants for all tokens, and picks."""
    names = {name.rpartition(".")[0] for name in routable_parameters(backbone)}
    handles = [
        backbone.get_submodule(name).register_forward_hook(_hook(variants, name, modality_ids))
        for name in names
    ]
    yield
    for handle in handles:
        handle.remove()


def _hook(variants, name: str, modality_ids: torch.Tensor):
    def hook(module, inputs, output):
        bare = copy.copy(module)
        bare._forward_hooks = {}  # so that calling it is not calling this
        for number, given in variants.items():
            values = {key: dense(given[f"{name}.{key}"]) for key, _ in module.named_parameters()}
            own = torch.func.functional_call(bare, values, inputs)
            chosen = (modality_ids == number).view(*output.shape[:2], *[1] * (output.dim() - 2))
            output = torch.where(chosen, own, output)
        return output

    return hook


ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""The streamed ones, and two whose norms are others and that are routed layer by layer."""


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_architectures(architecture: str) -> None:
    """With biases (qwen2), norms of queries and keys (qwen3), norms behind layers (gemma2)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=0,
    )
    backbone = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    variants = {}
    for number in (1, 3):
        variants[number] = {}
        for name in routable_parameters(backbone):
            value = backbone.get_parameter(name)
            changed = DenseWeight(value + 0.1 * torch.randn_like(value))
            variants[number][name] = changed
    tokens = torch.randint(0, 50, (3, 7))
    ids = torch.tensor([[0, 1, 1, 0, 3, 3, 0], [0, 0, 0, 0, 1, 3, 0], [3, 3, 0, 0, 0, 1, 0]])
    with picking(backbone, variants, ids):
        expected = backbone(tokens).logits
    route_backbone(backbone, variants)
    with routed(backbone, ids):
        torch.testing.assert_close(backbone(tokens).logits, expected, **CLOSE)
    assert not torch.allclose(backbone(tokens).logits, expected, **CLOSE)


def test_streamed_architectures_are_tested() -> None:
    assert set(ARCHITECTURES) >= STREAMED


@pytest.mark.parametrize("text", ["merged", "modality"])
def test_a_batch_of_mixed_prompts_is_its_prompts_one_by_one(setting, text) -> None:
    route_backbone(setting.backbone, setting.variants, text=text)
    batch = setting.batch(*MIXED)
    together, answers = logits(setting.model, batch), generate(setting.model, batch)
    for row, prompt in enumerate(MIXED):
        single = setting.batch(prompt)
        alone = logits(setting.model, single)[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)
        assert torch.equal(answers[row], generate(setting.model, single)[0])


@pytest.mark.parametrize("text", ["merged", "modality"])
def test_left_padding_changes_nothing(setting, text) -> None:
    route_backbone(setting.backbone, setting.variants, text=text)
    batch = setting.batch(MIXED[3])
    pad = {name: torch.zeros(1, 5, dtype=torch.long) for name in ("token", "mask", "modality")}
    padded = Batch(
        torch.cat([pad["token"], batch.token_ids], 1),
        torch.cat([pad["mask"], batch.attention_mask], 1),
        torch.cat([pad["modality"], batch.modality_ids], 1),
        batch.media,
        batch.labels,
    )
    torch.testing.assert_close(
        logits(setting.model, padded)[:, 5:], logits(setting.model, batch), **CLOSE
    )
    assert torch.equal(generate(setting.model, padded), generate(setting.model, batch))


@pytest.mark.parametrize("text", ["merged", "modality"])
def test_generating_with_the_cache_is_generating_without(setting, text) -> None:
    route_backbone(setting.backbone, setting.variants, text=text)
    batch = setting.batch(*MIXED)
    with_cache = generate(setting.model, batch)
    embedding = setting.backbone.get_input_embeddings()
    embedded, mask, ids = setting.model.embed(batch), batch.attention_mask, batch.modality_ids
    tokens = []
    with torch.no_grad(), routed(setting.backbone, ids):
        for _ in range(6):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            output = setting.backbone(
                inputs_embeds=embedded, attention_mask=mask, position_ids=positions, use_cache=False
            )
            tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
            embedded = torch.cat([embedded, embedding(tokens[-1])], 1)
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], 1)
    assert torch.equal(with_cache, torch.cat(tokens, 1))


def test_a_prefill_in_two_parts_is_one_prefill(setting) -> None:
    """What a pass covers follows from the cache, so a medium may even be cut in two."""
    route_backbone(setting.backbone, setting.variants)
    batch = setting.batch(MIXED[3])
    cut = int((batch.modality_ids[0] > 0).nonzero()[0]) + 1
    embedded = setting.model.embed(batch)
    with torch.no_grad(), routed(setting.backbone, batch.modality_ids):
        first = setting.backbone(inputs_embeds=embedded[:, :cut], use_cache=True)
        second = setting.backbone(
            inputs_embeds=embedded[:, cut:], past_key_values=first.past_key_values
        )
    both = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(both, logits(setting.model, batch), **CLOSE)


def test_zero_mask_is_the_base(tiny_folder: Path) -> None:
    setting = Setting(tiny_folder, "masked")
    batch = setting.batch(("image", "What?"))
    number = setting.model.modality_numbers["image"]
    variants = {
        number: {
            name: MaskedWeight(weight.base, weight.delta, torch.zeros_like(weight.mask), 3.0)
            for name, weight in setting.variants[number].items()
        }
    }
    route_backbone(setting.backbone, variants, text="modality")
    torch.testing.assert_close(
        logits(setting.model, batch), logits(setting.load().model, batch), **CLOSE
    )


def test_masked_weights_in_bfloat16_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(7, 5, generator=generator).bfloat16()  # 35 parameters: not whole bytes
    delta = torch.randn(7, 5, generator=generator).bfloat16()
    mask = torch.rand(7, 5, generator=generator) < 0.5
    packed = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
    got = MaskedWeight(base, delta, packed, 0.7).dense()
    expected = (base.float() + 0.7 * mask * delta.float()).bfloat16()
    assert torch.equal(got, expected)


def test_in_bfloat16_cached_and_unpacked_weights_agree(tiny_folder: Path) -> None:
    setting = Setting(tiny_folder, "masked", torch.bfloat16)
    batch = setting.batch(*MIXED)
    route_backbone(setting.backbone, setting.variants)
    each_time = logits(setting.model, batch)
    unroute_backbone(setting.backbone)
    route_backbone(setting.backbone, setting.variants, cache=True)
    assert torch.equal(logits(setting.model, batch), each_time)


def test_products_are_taken_as_the_layers_own(tiny_folder: Path, monkeypatch) -> None:
    """Where bfloat16 layers multiply in float32, routed ones do, and their bits are the same."""
    setting = Setting(tiny_folder, "dense", torch.bfloat16)
    number = setting.model.modality_numbers["image"]
    batch = setting.batch(*[("image", "What is it, and what is it for?")] * 4)
    assert batch.token_ids.numel() >= products.FEW
    alone = setting.alone(number).model
    for backbone in (alone.backbone, setting.backbone):
        products.widen_products(backbone)
    expected = logits(alone, batch)
    route_backbone(setting.backbone, setting.variants, text="modality")
    taken = []
    multiplied = products._multiplied
    monkeypatch.setattr(
        products, "_multiplied", lambda *given: taken.append(given) or multiplied(*given)
    )
    assert torch.equal(logits(setting.model, batch), expected)
    linear = sum(isinstance(module, RoutedLinear) for module in setting.backbone.modules())
    assert len(taken) >= linear


def test_the_loss_is_routed_too(setting) -> None:
    number = setting.model.modality_numbers["image"]
    prompt = setting.loaded.prompts.encode([MediaSlot("image"), "What?"], "red")
    batch = collate([prompt], [[torch.ones(3, 8)]], setting.loaded.prompts.pad_id)
    with torch.no_grad():
        expected = setting.alone(number).model(batch)
        route_backbone(setting.backbone, setting.variants, text="modality")
        torch.testing.assert_close(setting.model(batch), expected, **CLOSE)
