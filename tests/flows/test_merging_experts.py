"""PEFT's LoRA folders as experts of a merge."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from safetensors.torch import load_file, save_file

from flows.merging import merge
from graftline.errors import GraftlineError
from graftline.exchange.adapter_folders import write_expert
from graftline.exchange.kinship import distance
from graftline.merging.checkpoints import open_checkpoint
from graftline.model.backbone import load_backbone, make_tiny

QUIET = Console(quiet=True)
KINDS = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
    "square root": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 32},
    },
    "first pattern": {
        "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"],
        "alpha_pattern": {"layers.0.self_attn.q_proj": 64, "q_proj|v_proj": 2},
    },
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    make_tiny(tmp_path / "base", seed=0)
    model, tokenizer = load_backbone(tmp_path / "base", torch.float32)
    shutil.rmtree(tmp_path / "base")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _adapter(base, out, settings, seed=0):
    """An adapter with drawn factors; returns the model that PEFT itself makes of it."""
    model, _ = load_backbone(base, torch.float32)
    wrapped = get_peft_model(model, LoraConfig(**settings, task_type="CAUSAL_LM"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    wrapped.save_pretrained(out)
    return wrapped.merge_and_unload()


def _merge(base, experts, out, rule="average"):
    return merge(
        rule,
        str(base),
        [str(each) for each in experts],
        out,
        settings=[],
        keep=[],
        seed=0,
        shard_gigabytes=5.0,
        console=QUIET,
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_the_expert_that_peft_folds(kind, base, tmp_path):
    wanted = _adapter(base, tmp_path / "adapter", KINDS[kind]).state_dict()
    write_expert(base, tmp_path / "adapter", tmp_path / "expert")
    model, _ = load_backbone(tmp_path / "expert", torch.float32)
    before = load_backbone(base, torch.float32)[0].state_dict()
    changed = 0
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-5, atol=1e-6)
        changed += not value.equal(before[name])
    assert changed == {"plain": 4, "square root": 14}.get(kind, 4)


def test_sums_are_exact_in_float32_beside_tensors_as_they_are(base, tmp_path):
    model, _ = load_backbone(base, torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    _adapter(base, tmp_path / "adapter", KINDS["plain"])
    write_expert(base, tmp_path / "adapter", tmp_path / "expert")
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    made = {}
    for shard in base.glob("*.safetensors"):
        before, after = load_file(shard), load_file(tmp_path / "expert" / shard.name)
        assert before.keys() == after.keys()
        for name, weight in before.items():
            key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
            if f"{key}A.weight" in factors:
                product = 2.0 * (factors[f"{key}B.weight"] @ factors[f"{key}A.weight"])
                made[name] = after[name]
                assert after[name].equal(weight.float() + product)
            else:
                assert after[name].dtype == torch.bfloat16 and after[name].equal(weight)
    assert len(made) == 4


def test_an_adapter_that_was_changed_is_merged_again(base, tmp_path):
    _adapter(base, tmp_path / "adapter", KINDS["plain"])
    _merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert _merge(base, [tmp_path / "adapter"], tmp_path / "out").reused
    _changed(tmp_path / "adapter", lora_alpha=64)
    with pytest.raises(GraftlineError, match="choose an empty folder"):
        _merge(base, [tmp_path / "adapter"], tmp_path / "out")


@pytest.mark.parametrize("start", ["pissa_niter_16", "olora", "corda", "loftq"])
def test_an_adapter_whose_base_was_changed_is_refused(start, base, tmp_path):
    _adapter(base, tmp_path / "adapter", KINDS["plain"])
    _changed(tmp_path / "adapter", init_lora_weights=start)
    with pytest.raises(GraftlineError, match="path_initial_model_for_weight_conversion"):
        _merge(base, [tmp_path / "adapter"], tmp_path / "out")


def test_adapters_and_checkpoints_are_merged_together(base, tmp_path):
    first = _adapter(base, tmp_path / "first", KINDS["plain"], seed=1)
    second = _adapter(base, tmp_path / "second", KINDS["patterns"], seed=2)
    second.save_pretrained(tmp_path / "folded")
    report = _merge(base, [tmp_path / "first", tmp_path / "folded"], tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    ours, theirs = first.state_dict(), second.state_dict()
    for name, value in found.items():
        torch.testing.assert_close(value, (ours[name] + theirs[name]) / 2, rtol=1e-5, atol=1e-6)
    record = (tmp_path / "out/merge.json").read_text()
    assert str(tmp_path / "first") in record and ".tmp-" not in record
    assert not report.reused
    assert _merge(base, [tmp_path / "first", tmp_path / "folded"], tmp_path / "out").reused
    assert {p.name for p in tmp_path.iterdir()} == {"base", "first", "second", "folded", "out"}


def _changed(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_not_of_this_base_is_refused_with_what_shows_it(base, tmp_path):
    adapter = tmp_path / "adapter"
    _adapter(base, adapter, KINDS["plain"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    other = {k.replace("layers.1", "layers.9"): v for k, v in tensors.items()}
    other[f"{prefix}B.weight"] = torch.zeros(48, 4)
    save_file(other, file)
    _changed(adapter, use_dora=True, modules_to_save=["lm_head"])
    with pytest.raises(GraftlineError) as error:
        _merge(base, [adapter], tmp_path / "out")
    for words in ("layers.9.self_attn.q_proj.weight: the base has no such weight", "use_dora",
                  "its product is [48, 64], the base's [64, 64]", "modules_to_save"):  # fmt: skip
        assert words in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_at_hand_is_refused(base, tmp_path):
    make_tiny(tmp_path / "other", seed=1)
    _adapter(base, tmp_path / "adapter", KINDS["plain"])
    _changed(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(GraftlineError, match=r"was trained on .*other.*1\.\d+ of its norm away"):
        _merge(base, [tmp_path / "adapter"], tmp_path / "out")


def test_a_checkpoint_of_another_base_is_refused_by_its_distance(base, tmp_path):
    make_tiny(tmp_path / "other", seed=1)
    ours, theirs = open_checkpoint(base).entries, open_checkpoint(tmp_path / "other").entries
    assert distance(ours, ours) == 0.0
    assert distance(ours, theirs) == pytest.approx(2**0.5, rel=0.1)
    with pytest.raises(GraftlineError, match=r"lie 1\.\d+ times the base's norm away"):
        _merge(base, [tmp_path / "other"], tmp_path / "out")
    model, _ = load_backbone(base, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.03)
    model.save_pretrained(tmp_path / "near")
    assert distance(ours, open_checkpoint(tmp_path / "near").entries) == pytest.approx(0.03, 1e-3)
    _merge(base, [tmp_path / "near"], tmp_path / "out")


def test_a_finished_merge_is_read_before_it_is_called_finished(base, tmp_path):
    _adapter(base, tmp_path / "adapter", KINDS["plain"])
    _merge(base, [tmp_path / "adapter"], tmp_path / "out")
    assert _merge(base, [tmp_path / "adapter"], tmp_path / "out").reused
    weights = tmp_path / "out/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(GraftlineError, match="out: model.safetensors is not what was merged"):
        _merge(base, [tmp_path / "adapter"], tmp_path / "out")
    weights.write_bytes(whole)
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(GraftlineError, match="tokenizer_config.json is not what was merged"):
        _merge(base, [tmp_path / "adapter"], tmp_path / "out")
