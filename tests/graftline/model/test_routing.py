from __future__ import annotations

import copy
import dataclasses
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from graftline.errors import GraftlineError
from graftline.model.backbone import load_backbone
from graftline.model.loading import assemble, new_connector
from graftline.model.multimodal import Batch, collate
from graftline.model.prompts import MediaSlot
from graftline.model.routing import (
    DenseWeight,
    LowRankWeight,
    MaskedWeight,
    RoutedLinear,
    RoutedModel,
    routable_parameters,
    route_backbone,
    routed,
    unroute_backbone,
)
from graftline.model.routing.layers import STREAMED
from graftline.model.routing.router import ATTRIBUTE

NAMES = ("audio", "image", "point_cloud", "video")
KINDS = ("dense", "masked", "low-rank")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
DELTA = 0.05
"""Large against the tiny model's weights, so that a wrong route shows."""


class Setting:
    """A tiny model with four modalities and what their weights are, routed and dense."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype
        self.loaded = self.load()
        self.model, self.backbone = self.loaded.model, self.loaded.model.backbone
        self.generator = torch.Generator().manual_seed(7)
        self.base = {
            name: self.backbone.get_parameter(name).detach().clone()
            for name in routable_parameters(self.backbone)
        }
        self.delta = {name: self.noise(value) for name, value in self.base.items()}
        with torch.no_grad():  # what text meets differs from the base and from all modalities
            for name, value in self.delta.items():
                self.backbone.get_parameter(name).add_(value, alpha=0.3)
        self.variants = {
            number: {name: self.weight(kind, number, name) for name in self.base}
            for number in self.model.modality_numbers.values()
        }

    def load(self):
        backbone = load_backbone(self.folder, self.dtype, "eager")
        rows = torch.randn(32, 3, 8, generator=torch.Generator().manual_seed(3))
        shape = {"tokens": 2, "hidden": 16}
        pairs = [
            new_connector(name, backbone[0], rows, shape, seed, "backbone1")
            for seed, name in enumerate(NAMES)
        ]
        loaded = assemble(backbone, pairs, "")
        return dataclasses.replace(loaded, model=RoutedModel.around(loaded.model).eval())

    def noise(self, like: torch.Tensor) -> torch.Tensor:
        drawn = torch.randn(like.shape, generator=self.generator)
        return (DELTA * drawn).to(like.dtype)

    def weight(self, kind: str, number: int, name: str):
        base = self.base[name]
        if kind == "masked":
            mask = torch.rand(base.shape, generator=self.generator) < 0.5
            packed = torch.from_numpy(np.packbits(mask.numpy().reshape(-1)))
            return MaskedWeight(base, self.delta[name], packed, scale=0.5 + number)
        if kind == "low-rank" and base.dim() == 2:
            down = self.noise(base[:3])
            return LowRankWeight(
                self.backbone.get_parameter(name), down, self.noise(base[:, :3].contiguous()), 8.0
            )
        return DenseWeight(base + self.noise(base))

    def alone(self, number: int):
        """The multimodal model whose backbone is that of one modality."""
        loaded = self.load()
        with torch.no_grad():
            for name, weight in self.variants[number].items():
                loaded.model.backbone.get_parameter(name).copy_(dense(weight))
        return loaded

    def batch(self, *prompts: tuple[str, ...]) -> Batch:
        """A batch of prompts of texts and, where a part is a modality's name, made-up media."""
        encoded, media = [], []
        for parts in prompts:
            slots = [MediaSlot(part) if part in NAMES else part for part in parts]
            encoded.append(self.loaded.prompts.encode(slots))
            generator = torch.Generator().manual_seed(len("".join(parts)))
            media.append(
                [torch.randn(3, 8, generator=generator) for part in parts if part in NAMES]
            )
        return collate(encoded, media, self.loaded.prompts.pad_id)


def dense(weight) -> torch.Tensor:
    """What a weight means, by the definition."""
    if isinstance(weight, DenseWeight):
        return weight.weight
    if isinstance(weight, LowRankWeight):
        return weight.base.detach() + weight.scale * weight.up @ weight.down
    bits = np.unpackbits(weight.mask.numpy())[: weight.base.numel()]
    mask = torch.from_numpy(bits).view(weight.base.shape)
    return weight.base + weight.scale * mask * weight.delta


@torch.no_grad()
def logits(model, batch: Batch) -> torch.Tensor:
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    with routed(model.backbone, batch.modality_ids):
        output = model.backbone(
            inputs_embeds=model.embed(batch),
            attention_mask=batch.attention_mask,
            position_ids=positions,
        )
    return output.logits


def generate(model, batch: Batch) -> torch.Tensor:
    return model.generate(batch, 6, pad_id=0, end_id=-1)


MIXED = (
    ("image", "What?"),
    ("Look:", "audio", "and", "video", "Say it."),
    ("point_cloud", "image", "audio", "Which one of the three is it?"),
    ("video", "a", "image", "b", "audio", "c", "point_cloud", "Tell."),
    ("No media at all.",),
)


@pytest.fixture(params=KINDS)
def setting(request, tiny_folder: Path) -> Setting:
    return Setting(tiny_folder, request.param)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("name", ["audio", "video"])
def test_with_text_as_a_modality_it_is_that_modalitys_dense_model(setting, name, cache) -> None:
    number = setting.model.modality_numbers[name]
    expected_model = setting.alone(number).model
    batch = setting.batch((name, "What?"), ("A longer one:", name, name, "Tell me."))
    expected, answers = logits(expected_model, batch), generate(expected_model, batch)
    assert not torch.allclose(logits(setting.model, batch), expected, **CLOSE)
    route_backbone(setting.backbone, setting.variants, text_as=number, cache=cache)
    torch.testing.assert_close(logits(setting.model, batch), expected, **CLOSE)
    assert torch.equal(generate(setting.model, batch), answers)


def test_every_token_meets_its_own_weights_and_no_others(setting) -> None:
    """Against computing every variant for every token and picking, layer by layer (DAMC)."""
    batch = setting.batch(*MIXED)
    route_backbone(setting.backbone, setting.variants)
    got = logits(setting.model, batch)
    unroute_backbone(setting.backbone)
    with picking(setting.backbone, setting.variants, batch.modality_ids):
        torch.testing.assert_close(got, logits(setting.model, batch), **CLOSE)


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


def test_a_batch_of_mixed_prompts_is_its_prompts_one_by_one(setting) -> None:
    route_backbone(setting.backbone, setting.variants)
    batch = setting.batch(*MIXED)
    together, answers = logits(setting.model, batch), generate(setting.model, batch)
    for row, prompt in enumerate(MIXED):
        single = setting.batch(prompt)
        alone = logits(setting.model, single)[0]
        torch.testing.assert_close(together[row, -len(alone) :], alone, **CLOSE)
        assert torch.equal(answers[row], generate(setting.model, single)[0])


def test_left_padding_changes_nothing(setting) -> None:
    route_backbone(setting.backbone, setting.variants)
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


def test_generating_with_the_cache_is_generating_without(setting) -> None:
    route_backbone(setting.backbone, setting.variants)
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
    route_backbone(setting.backbone, variants, text_as=number)
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


def test_the_loss_is_routed_too(setting) -> None:
    number = setting.model.modality_numbers["image"]
    prompt = setting.loaded.prompts.encode([MediaSlot("image"), "What?"], "red")
    batch = collate([prompt], [[torch.ones(3, 8)]], setting.loaded.prompts.pad_id)
    with torch.no_grad():
        expected = setting.alone(number).model(batch)
        route_backbone(setting.backbone, setting.variants, text_as=number)
        torch.testing.assert_close(setting.model(batch), expected, **CLOSE)


def test_removal_restores_modules_and_logits(setting) -> None:
    batch = setting.batch(*MIXED)
    before, state = logits(setting.model, batch), setting.backbone.state_dict()
    types = {name: type(module) for name, module in setting.backbone.named_modules()}
    route_backbone(setting.backbone, setting.variants)
    assert not torch.allclose(logits(setting.model, batch), before, **CLOSE)
    kinds = {type(module) for module in setting.backbone.model.layers.modules()}
    assert RoutedLinear in kinds
    unroute_backbone(setting.backbone)
    assert {name: type(m) for name, m in setting.backbone.named_modules()} == types
    after = setting.backbone.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(logits(setting.model, batch), before)
    hooks = [m for m in setting.backbone.model.modules() if m._forward_pre_hooks]
    assert not hooks
    assert not hasattr(setting.backbone, ATTRIBUTE)
    unroute_backbone(setting.backbone)  # a second time does nothing


def test_text_alone_meets_the_backbones_own_weights(setting) -> None:
    batch = setting.batch(("No media at all.",))
    before = logits(setting.model, batch)
    route_backbone(setting.backbone, setting.variants)
    assert torch.equal(logits(setting.model, batch), before)
    ids = batch.token_ids
    assert torch.equal(setting.backbone(input_ids=ids).logits, setting.backbone(ids).logits)


QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("dense", {"weight": torch.zeros(64, 63)}, r"q_proj.weight: the weight has shape \(64, 63"),
        ("dense", {"weight": torch.zeros(64, 64).half()}, "float16 on cpu, the backbone is"),
        ("masked", {"base": torch.zeros(64, 32)}, "the base has shape"),
        ("masked", {"delta": torch.zeros(32, 64)}, "the task vector has shape"),
        ("masked", {"delta": torch.zeros(64, 64).T}, None),
        ("masked", {"mask": torch.zeros(511, dtype=torch.uint8)}, r"packed into torch.uint8 \(512"),
        ("masked", {"mask": torch.zeros(64, 64, dtype=torch.bool)}, "numpy.packbits"),
        ("low-rank", {"down": torch.zeros(3, 65)}, "adapter's A has shape"),
        ("low-rank", {"up": torch.zeros(64, 4)}, "adapter's B has shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tiny_folder, kind, change, message) -> None:
    setting = Setting(tiny_folder, kind)
    given = setting.variants[2]
    given[QUERY] = dataclasses.replace(given[QUERY], **change)
    with pytest.raises(GraftlineError, match=message or "not contiguous") as caught:
        route_backbone(setting.backbone, setting.variants)
    assert f"Modality 2, {QUERY}" in str(caught.value)
    assert not hasattr(setting.backbone, ATTRIBUTE)


def test_missing_and_unknown_weights_are_refused(tiny_folder: Path) -> None:
    setting = Setting(tiny_folder, "dense")
    given = dict(setting.variants[1])
    weight = given.pop(QUERY)
    with pytest.raises(GraftlineError, match=f"Modality 1 has no weight for {QUERY}"):
        route_backbone(setting.backbone, {1: given})
    with pytest.raises(GraftlineError, match="embed_tokens.weight cannot be routed"):
        route_backbone(
            setting.backbone, {1: {**setting.variants[1], "model.embed_tokens.weight": weight}}
        )
    with pytest.raises(GraftlineError, match="start at 1"):
        route_backbone(setting.backbone, {0: setting.variants[1]})
    with pytest.raises(GraftlineError, match="text_as is 9"):
        route_backbone(setting.backbone, setting.variants, text_as=9)
    route_backbone(setting.backbone, setting.variants)
    with pytest.raises(GraftlineError, match="routed already"):
        route_backbone(setting.backbone, setting.variants)


def test_wrong_use_is_refused(tiny_folder: Path) -> None:
    setting = Setting(tiny_folder, "dense")
    batch = setting.batch(("image", "What?"))
    number = setting.model.modality_numbers["video"]
    route_backbone(setting.backbone, {number: setting.variants[number]})
    with pytest.raises(GraftlineError, match="holds tokens of modality 2"):
        logits(setting.model, batch)
    unroute_backbone(setting.backbone)
    route_backbone(setting.backbone, setting.variants)
    with pytest.raises(GraftlineError, match=r"torch\.no_grad"):
        setting.model(batch)
    with pytest.raises(GraftlineError, match="without output_hidden_states"):
        with torch.no_grad(), routed(setting.backbone, batch.modality_ids):
            setting.backbone(inputs_embeds=setting.model.embed(batch), output_hidden_states=True)
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(GraftlineError, match="sees 1 rows, but modalities were given for 2"):
        with torch.no_grad(), routed(setting.backbone, ids):
            setting.backbone(input_ids=ids[:1])


def test_no_token_is_multiplied_twice(setting, monkeypatch) -> None:
    """The rows that reach the products of a layer are the tokens of the batch, no more."""
    rows = []
    multiply = torch.mm

    def counted(left, right, **named):
        rows.append(len(left))
        return multiply(left, right, **named)

    batch = setting.batch(*MIXED)
    route_backbone(setting.backbone, setting.variants)
    linear = sum(isinstance(module, RoutedLinear) for module in setting.backbone.modules())
    monkeypatch.setattr(torch, "mm", counted)
    logits(setting.model, batch)
    assert sum(rows) == linear * batch.token_ids.numel()
