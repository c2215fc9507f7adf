"""Merging on the disk: the same bytes as in memory, whole or not at all."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from graftline.merging import reading
from graftline.merging.compatibility import CannotMergeCheckpoints
from graftline.merging.core import Block, Context, added, decoupled, walk_over
from graftline.merging.masks import decoupled_weight, load_masks
from graftline.merging.rules import RULES, parameters_for
from graftline.merging.streaming import MergeRequest, merge_checkpoints
from tests.graftline.merging import checkpoint_maker as maker
from tests.graftline.merging.folders import files_of, refused, tensors_of

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, list[Path]]:
    return maker.trio(tmp_path_factory.mktemp("models"))


# --- results -------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("name", RULES)
def test_streaming_gives_what_the_rule_gives_in_memory(models, tmp_path, name, scope):
    base, experts = models
    rule = RULES[name]
    scoped = "scope" in rule.parameters.model_fields
    if scope == "tensor" and not scoped:
        pytest.skip("has no scope")
    chosen = {"scope": scope} if scoped else {}
    report = merge_checkpoints(MergeRequest(name, base, tuple(experts), tmp_path / "out", chosen))
    assert (report.merged, report.kept, report.warnings) == (6, 0, ())
    parameters = parameters_for(rule, chosen, 2)
    start, tuned = tensors_of(base), [tensors_of(expert) for expert in experts]
    blocks = [Block(t, tuple(e[n] for e in tuned), t.numel()) for n, t in start.items()]
    found = rule.statistics(walk_over(blocks), parameters) if scope == "global" else None
    got = tensors_of(tmp_path / "out")
    assert got.keys() == start.keys()
    masks = [load_masks(p) for p in sorted((tmp_path / "out" / "masks").glob("*"))]
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    for tensor, before in start.items():
        context = Context(tensor, statistics=found)
        merged = rule.merge(before, [e[tensor] for e in tuned], parameters, context)
        assert got[tensor].dtype == before.dtype
        if name == "pcb":  # thresholds on scores, which a vector unit may round in two ways
            torch.testing.assert_close(got[tensor], added(before, merged.tau))
        else:
            assert torch.equal(got[tensor], added(before, merged.tau)), tensor
        for index, mask in enumerate(masks):
            assert torch.equal(mask[tensor], merged.masks[index])
            scale = record["scales"][tensor][index]
            assert scale == pytest.approx(merged.scales[index], rel=1e-9)
            own = decoupled_weight(before, got[tensor], mask[tensor], scale)
            exact = decoupled(before, merged, index)
            torch.testing.assert_close(own, exact, rtol=0.02, atol=1e-4)
    assert len(masks) == (2 if rule.one_per_expert else 0)


def test_average_is_the_nearest_value_in_every_element(models, tmp_path):
    base, experts = models
    merge_checkpoints(MergeRequest("average", base, tuple(experts), tmp_path / "out"))
    first, second = (tensors_of(expert) for expert in experts)
    for name, value in tensors_of(tmp_path / "out").items():
        exact = (first[name].double() + second[name].double()) / 2
        here = (value.double() - exact).abs()
        bits = value.view(torch.int16)
        for neighbour in (bits + 1, bits - 1):
            there = (neighbour.view(torch.bfloat16).double() - exact).abs()
            assert not ((there < here) | ((there == here) & (bits & 1 == 1))).any()


@pytest.mark.parametrize("name", ["average", "ties", "emr", "dare-ties", "mmer"])
def test_neither_shards_nor_threads_nor_order_change_a_byte(models, tmp_path, name):
    base, experts = models
    before, seen = torch.get_num_threads(), []
    try:
        for size, threads, order in ((10**9, 1, 1), (100_000, 3, 1), (20_000, 2, -1)):
            torch.set_num_threads(threads)
            out = tmp_path / str(size)
            chosen = experts[:: order if RULES[name].symmetric else 1]
            merge_checkpoints(
                MergeRequest(name, base, tuple(chosen), out, seed=3, shard_bytes=size)
            )
            seen.append(
                {n: t.view(torch.int16).numpy().tobytes() for n, t in tensors_of(out).items()}
            )
    finally:
        torch.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


@pytest.mark.parametrize("name", ["average", "ties", "dare-ties", "mmer"])
def test_small_buffers_and_many_threads_change_no_byte(tmp_path, monkeypatch, name):
    """Hundreds of segments, each in runs, so that buffers are used again while threads compute."""
    start = maker.weights(0)
    tower = {"tower.ids": torch.arange(5000)}
    base = maker.write(tmp_path / "base", {**start, **tower})
    experts = tuple(
        maker.write(tmp_path / f"e{n}", maker.weights(n, base=start)) for n in (1, 2, 3)
    )
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        merge_checkpoints(MergeRequest(name, base, experts, tmp_path / "whole"))
        monkeypatch.setattr(reading, "BLOCK", 64)
        monkeypatch.setattr(reading, "RUN", 128)
        monkeypatch.setattr(reading, "_BUFFER_BYTES", 4096)
        merge_checkpoints(MergeRequest(name, base, experts, tmp_path / "cut"))
    finally:
        torch.set_num_threads(before)
    whole, cut = files_of(tmp_path / "whole"), files_of(tmp_path / "cut")
    assert whole == cut
    assert torch.equal(tensors_of(tmp_path / "cut")["tower.ids"], tower["tower.ids"])


def test_result_is_a_sharded_checkpoint_with_card_and_companions(models, tmp_path):
    base, experts = models
    out = tmp_path / "deep" / "out"
    merge_checkpoints(MergeRequest("ties", base, tuple(experts), out, shard_bytes=100_000))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(maker.SHAPES)
    for name, file in index["weight_map"].items():
        with safe_open(out / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
            assert shard.metadata() == {"format": "pt"}
            sizes = [shard.get_tensor(n).numel() * 2 for n in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= 100_000 or len(sizes) == 1
    assert index["metadata"]["total_size"] == 2 * sum(
        int(np.prod(s)) for s in maker.SHAPES.values()
    )
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert (out / "tokenizer.json").exists()
    card = (out / "README.md").read_text()
    assert "--rule ties" in card and "arXiv 2306.01708" in card and '"e1"' in card
    record = json.loads((out / "merge.json").read_text())
    import hashlib

    for file, entry in record["files"].items():
        assert hashlib.sha256((out / file).read_bytes()).hexdigest() == entry["sha256"]
    assert not list(out.parent.glob(".tmp-*"))


def test_transformers_reads_the_result(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_folder / "model.safetensors")
    moved = {name: tensor + 0.01 for name, tensor in tensors.items()}
    expert = tmp_path / "expert"
    expert.mkdir()
    save_file(moved, expert / "model.safetensors", metadata={"format": "pt"})
    (expert / "config.json").write_bytes((tiny_folder / "config.json").read_bytes())
    merge_checkpoints(
        MergeRequest("average", tiny_folder, (expert,), tmp_path / "out", shard_bytes=20_000)
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in moved.items())


def test_the_same_request_again_is_a_look(models, tmp_path):
    base, experts = models
    request = MergeRequest("average", base, tuple(experts), tmp_path / "out")
    assert not merge_checkpoints(request).reused
    before = files_of(tmp_path / "out")
    assert merge_checkpoints(request).reused
    assert files_of(tmp_path / "out") == before
    with pytest.raises(CannotMergeCheckpoints, match="choose an empty folder"):
        merge_checkpoints(dataclasses.replace(request, rule="ties"))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    with pytest.raises(CannotMergeCheckpoints, match="choose an empty folder"):
        merge_checkpoints(request)


# --- towers, ties, dtypes ------------------------------------------------------------------


def test_what_only_the_base_has_and_kept_prefixes_stay_bit_identical(tmp_path):
    start = maker.weights(0)
    tower = {"tower.w": torch.randn(9, 3), "model.position_ids": torch.arange(7)}
    base = maker.write(tmp_path / "base", {**start, **tower})
    expert = maker.write(tmp_path / "e", maker.weights(1, base=start))
    request = MergeRequest("average", base, (expert,), tmp_path / "o", keep={"model.norm.": None})
    report = merge_checkpoints(request)
    got = tensors_of(tmp_path / "o")
    assert (report.merged, report.kept) == (5, 3)
    for name in ("tower.w", "model.position_ids", "model.norm.weight"):
        assert torch.equal(got[name], {**start, **tower}[name])
        assert got[name].dtype == {**start, **tower}[name].dtype


def test_a_prefix_may_be_kept_from_another_folder(tmp_path):
    start = maker.weights(0)
    tower = {"tower.w": torch.randn(9, 3)}
    base = maker.write(tmp_path / "base", start)
    expert = maker.write(tmp_path / "e", {**maker.weights(1, base=start), **tower})
    assert "tower.w is not in the base" in refused(base, [expert], tmp_path / "o")
    keep = {"tower.": expert}
    merge_checkpoints(MergeRequest("average", base, (expert,), tmp_path / "o", keep=keep))
    assert torch.equal(tensors_of(tmp_path / "o")["tower.w"], tower["tower.w"])
    text = refused(base, [expert], tmp_path / "p", keep={"towr.": expert})
    assert "no tensor begins with the kept prefix 'towr.'" in text


def test_a_tied_head_is_understood_whether_stored_or_not(tmp_path):
    tied = {**maker.CONFIG, "tie_word_embeddings": True}
    start = maker.weights(0)
    start["lm_head.weight"] = start["model.embed_tokens.weight"].clone()
    moved = maker.weights(1, base=start)
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"].clone()
    without = {n: t for n, t in start.items() if n != "lm_head.weight"}
    moved_without = {n: t for n, t in moved.items() if n != "lm_head.weight"}
    bare = maker.write(tmp_path / "bare", without, config=tied)
    stored = maker.write(tmp_path / "stored", start, config=tied)
    expert = maker.write(tmp_path / "e", moved, config=tied)
    expert_bare = maker.write(tmp_path / "eb", moved_without, config=tied)
    loose = maker.write(tmp_path / "loose", maker.weights(2, base=start))
    merge_checkpoints(MergeRequest("average", bare, (expert,), tmp_path / "o1"))
    assert tensors_of(tmp_path / "o1").keys() == without.keys()
    merge_checkpoints(MergeRequest("average", stored, (expert_bare,), tmp_path / "o2"))
    got = tensors_of(tmp_path / "o2")
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert "untie the base or tie the expert" in refused(bare, [loose], tmp_path / "o3")


def test_dtypes_may_differ_and_the_base_decides(tmp_path):
    start = maker.weights(0)
    base = maker.write(tmp_path / "base", start)
    moved = maker.weights(1, torch.float32, base=start)
    expert = maker.write(tmp_path / "e", moved)
    half = maker.write(tmp_path / "h", maker.weights(2, torch.float16, base=start))
    report = merge_checkpoints(MergeRequest("average", base, (expert, half), tmp_path / "o"))
    assert any("holds F32 where the base has BF16" in warning for warning in report.warnings)
    got, halves = tensors_of(tmp_path / "o"), tensors_of(half)
    for name, value in got.items():
        exact = (moved[name].double() + halves[name].double()) / 2
        assert value.dtype == torch.bfloat16
        assert torch.allclose(value.double(), exact, rtol=2**-8, atol=1e-12)


def test_an_expert_that_is_the_base_is_a_warning(models, tmp_path):
    base, experts = models
    copy = maker.write(tmp_path / "copy", tensors_of(base))
    for twin in (base, copy):
        request = MergeRequest("mmer", base, (experts[0], twin), tmp_path / f"out-{twin.name}")
        warnings = merge_checkpoints(request).warnings
        assert len(warnings) == 1 and f"{twin}: equals the base" in warnings[0]
