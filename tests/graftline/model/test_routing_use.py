"""Routing put in and taken out; what does not fit is refused by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from graftline.errors import GraftlineError
from graftline.model.routing import (
    RoutedLinear,
    route_backbone,
    routed,
    unroute_backbone,
)
from graftline.model.routing.router import ATTRIBUTE
from tests.graftline.model.routing_setting import (
    CLOSE,
    MIXED,
    Setting,
    logits,
)


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


@pytest.mark.parametrize("text", ["merged", "modality"])
def test_text_alone_meets_the_backbones_own_weights(setting, text) -> None:
    batch = setting.batch(("No media at all.",))
    before = logits(setting.model, batch)
    route_backbone(setting.backbone, setting.variants, text=text)
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
