"""bfloat16 layers whose products are taken in float32."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from graftline.model import products
from graftline.model.backbone import make_tiny
from graftline.model.opening import open_backbone
from graftline.model.precision import products_are_faster_wide
from graftline.model.products import FEW, WidenedLinear, widen_products

WITHOUT_AMX = {"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}


def _layer(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(40, 24, bias=bias, dtype=torch.bfloat16)
    widen_products(nn.Sequential(layer))
    return layer


@pytest.mark.parametrize("block", [1 << 20, 200], ids=["whole", "in-blocks-of-5-rows"])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_rounded_once(
    bias: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against float64: no element is further off than half a step of bfloat16."""
    monkeypatch.setattr(products, "_BLOCK", block)
    layer = _layer(bias)
    rows = torch.randn(2, FEW, 40, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(2, FEW, 24, dtype=torch.bfloat16)
    output = layer(rows)
    output.backward(gradient)
    wide_rows, wide = rows.detach().double(), layer.weight.detach().double()
    exact = {"output": wide_rows @ wide.T, "rows": gradient.double() @ wide}
    exact["weight"] = gradient.double().flatten(0, 1).T @ wide_rows.flatten(0, 1)
    if bias:  # added to the rounded product, as a second rounding
        exact["output"] = exact["output"].bfloat16().double() + layer.bias.detach().double()
    found = {"output": output, "rows": rows.grad, "weight": layer.weight.grad}
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor.double(), exact[name], rtol=2**-8, atol=1e-5)


def test_scratch_memory_serves_inference_first_and_training_then() -> None:
    layer = _layer(False)
    rows = torch.randn(FEW, 40, dtype=torch.bfloat16)
    with torch.inference_mode():
        products._kept.__dict__.clear()
        alone = layer(rows)
    layer(rows).sum().backward()
    assert torch.equal(alone, layer(rows))
    assert layer.weight.grad is not None


def test_scratch_memory_is_wide_while_another_thread_builds_a_model() -> None:
    layer = _layer(False)
    products._kept.__dict__.clear()
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer(torch.randn(FEW, 40)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {held.dtype for held in vars(products._kept).values()} == {torch.float32}


def test_frozen_parts_get_no_gradient() -> None:
    layer = _layer(False)
    layer.weight.requires_grad_(False)
    rows = torch.randn(FEW, 40, dtype=torch.bfloat16, requires_grad=True)
    layer(rows).sum().backward()
    assert layer.weight.grad is None
    assert rows.grad is not None


def test_few_rows_and_other_dtypes_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = _layer(False)
    monkeypatch.setattr(products, "_Product", None)  # would raise
    layer(torch.randn(FEW - 1, 40, dtype=torch.bfloat16))
    layer.float()(torch.randn(FEW, 40))


def test_layers_keep_their_names_and_copies_are_widened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("graftline.model.precision._cpu_multiplies_bfloat16", lambda: True)
    make_tiny(tmp_path, seed=0)
    model, _ = open_backbone(tmp_path, "bfloat16", "auto", "cpu")
    names = set(model.state_dict())
    widen_products(model)
    assert set(model.state_dict()) == names
    copied = copy.deepcopy(model).model.layers[0].mlp.up_proj
    assert isinstance(copied, WidenedLinear)
    assert copied.weight is not model.model.layers[0].mlp.up_proj.weight


@pytest.mark.parametrize(
    ("cpu", "expected"),
    [
        (WITHOUT_AMX, True),
        ({**WITHOUT_AMX, "amx_bf16": True}, False),
        ({"cpu_name": "AMD EPYC", "avx512_bf16": True, "amx_bf16": False}, False),
        ({}, False),
    ],
)
def test_intel_without_amx_multiplies_float32_faster(
    cpu: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu, raising=False)
    monkeypatch.setattr("graftline.model.precision._cpu_multiplies_bfloat16", lambda: True)
    assert products_are_faster_wide(torch.bfloat16, "cpu") == expected
    assert not products_are_faster_wide(torch.bfloat16, "cuda")
    assert not products_are_faster_wide(torch.float32, "cpu")
    make_tiny(tmp_path, seed=0)
    model, _ = open_backbone(tmp_path, "bfloat16", "auto", "cpu")
    widened = {isinstance(m, WidenedLinear) for m in model.modules() if isinstance(m, nn.Linear)}
    assert widened == {expected}
