from __future__ import annotations

from pathlib import Path

import pytest
import torch

from graftline.model import precision
from graftline.model.backbone import make_tiny, save_backbone
from graftline.model.opening import open_backbone
from graftline.model.precision import computing_dtype


@pytest.fixture(params=[True, False], ids=["cpu-with-bfloat16", "cpu-without"])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(precision, "_cpu_multiplies_bfloat16", lambda: request.param)
    return bool(request.param)


def test_only_bfloat16_on_a_cpu_that_cannot_multiply_it_is_widened(fast: bool) -> None:
    assert computing_dtype(torch.bfloat16, "cpu") == (torch.bfloat16 if fast else torch.float32)
    assert computing_dtype(torch.bfloat16, "cuda:1") == torch.bfloat16
    assert computing_dtype(torch.float16, "cpu") == torch.float16
    assert computing_dtype(torch.float32, "cpu") == torch.float32


def test_this_cpu_has_an_answer() -> None:
    assert precision._cpu_multiplies_bfloat16() in (True, False)


def test_widening_changes_no_weight_on_disk(fast: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path / "tiny", seed=0)
    model, tokenizer = open_backbone(tmp_path / "tiny", "bfloat16", "auto", "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16 if fast else torch.float32}
    save_backbone(model, tokenizer, tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "tiny" / name).read_bytes()


def test_a_learned_weight_is_rounded_once(fast: bool, tmp_path: Path) -> None:
    make_tiny(tmp_path / "tiny", seed=0)
    model, tokenizer = open_backbone(tmp_path / "tiny", "bfloat16", "auto", "cpu")
    learned = model.model.norm.weight.detach().clone() * 1.01
    model.model.norm.weight.data.copy_(learned)
    save_backbone(model, tokenizer, tmp_path / "again")
    again, _ = open_backbone(tmp_path / "again", "bfloat16", "auto", "cpu")
    assert torch.equal(again.model.norm.weight.bfloat16(), learned.bfloat16())
