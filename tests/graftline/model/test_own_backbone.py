"""Backbones of the user's own: pico models of the classes that users bring."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from graftline.data.examples import ExampleSet, TrainingSet
from graftline.errors import GraftlineError
from graftline.evaluation.answering import answer_all
from graftline.model.attention import attention_for
from graftline.model.backbone import load_backbone
from graftline.model.loading import assemble, read_connector, read_record
from graftline.model.own_backbone import (
    _check_interface,
    backbone_name,
    backbone_parameters,
    backbone_problem,
    write_own_backbone,
)
from graftline.model.prompts import MediaSlot, PromptEncoder
from graftline.recipe import LoraSettings, PhaseSettings
from graftline.settings.models import BackboneSource
from graftline.training import phases
from tests.graftline.pico_models import LLMS, pickled, pico_llm

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def _written(folder: Path, out: Path) -> Path:
    recorded = backbone_parameters(BackboneSource(folder=str(folder)))["source"]
    write_own_backbone(recorded, out)
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory, tiny_folder) -> Path:
    return pico_llm("llama", tmp_path_factory.mktemp("llama") / "llama", tiny_folder)


@pytest.mark.parametrize(
    ("kind", "mode"), [*((kind, "full") for kind in sorted(LLMS)), ("qwen2", "lora")]
)
def test_every_class_is_aligned_tuned_saved_and_asked(
    kind, mode, tmp_path, tiny_folder, features_folder
):
    theta = _written(pico_llm(kind, tmp_path / "own", tiny_folder), tmp_path / "theta")
    settings = PhaseSettings(steps=3, batch_size=48, learning_rate=1e-3)  # all rows a step

    def call(name: str, backbone: Path) -> phases.Call:
        (tmp_path / name).mkdir()
        attention = attention_for(backbone, "cpu")
        return phases.Call(
            backbone=load_backbone(backbone, torch.float32, attention),
            backbone_fingerprint=backbone.parent.name,
            features={"image": features_folder},
            system_prompt="",
            seed=0,
            work=tmp_path / f"{name}-work",
            out=tmp_path / name,
            label=name,
        )

    base = call("aligned", theta)
    assert (base.backbone[0].config.tie_word_embeddings is not False) == (
        kind in ("qwen2", "gemma")
    )
    phases.align(base, settings, "image", {"tokens": 2, "hidden": 8})
    phases.fine_tune(
        call("tuned", theta), settings, {"image": tmp_path / "aligned"}, mode=mode,
        lora=LoraSettings(rank=2), connector_learning_rate=1e-3, train_embeddings=False,
        result_fingerprint="tuned",
    )  # fmt: skip
    before = load_file(theta / "model.safetensors")
    after = load_file(tmp_path / "tuned" / "backbone" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and not any("embed_tokens" in name for name in changed)
    losses = json.loads((tmp_path / "tuned" / "history.json").read_text())["losses"]
    assert losses[-1] < losses[0]
    record = read_record(tmp_path / "tuned", "image")
    loaded = assemble(
        load_backbone(tmp_path / "tuned" / "backbone", torch.float32),
        [(record, read_connector(tmp_path / "tuned", record))],
        "",
    )
    examples = ExampleSet(features_folder, "image", "test", loaded.prompts)
    batched = answer_all(loaded, examples, batch_size=16, max_new_tokens=4, label="all")
    single = answer_all(loaded, examples, batch_size=1, max_new_tokens=4, label="one")
    assert batched == single  # padding on the left changes no answer
    loss = loaded.model(TrainingSet([examples], 4, 0).batch(0))
    assert torch.isfinite(loss)


def test_dropout_is_off_so_that_a_run_that_is_resumed_ends_with_the_same_bits(
    tmp_path, tiny_folder
):
    tokenizer = load_backbone(tiny_folder)[1]
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": len(tokenizer)}
    own = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    assert own.config.attn_pdrop > 0
    own.save_pretrained(tmp_path / "own")
    tokenizer.save_pretrained(tmp_path / "own")
    model, _ = load_backbone(_written(tmp_path / "own", tmp_path / "theta"), torch.float32)
    assert len(own.state_dict()) == len(model.state_dict())
    model.train()
    tokens = torch.arange(12)[None]
    first, second = (model(tokens).logits for _ in range(2))
    assert torch.equal(first, second)


def test_a_tokenizer_without_template_and_padding_gets_the_plain_one(llama, tmp_path):
    _, tokenizer = load_backbone(_written(llama, tmp_path / "theta"))
    assert tokenizer.pad_token_id is None
    prompts = PromptEncoder(tokenizer, {"image": 2}, "Be brief.")
    prompt = prompts.encode([MediaSlot("image"), "What? <|im_end|>"], "Red")
    places = zip(prompt.token_ids, prompt.modality_ids, strict=True)
    text = tokenizer.decode([token for token, modality in places if modality == 0])
    assert text == "<|im_start|>Be brief.\nUSER: What? <|im_end|>\nASSISTANT: "
    ends = [token for token in prompt.token_ids if token == tokenizer.eos_token_id]
    assert len(ends) == 2  # the two media places; what a user writes stays text
    assert prompt.modality_ids.count(1) == 2
    assert prompt.answer_ids[-1] == tokenizer.eos_token_id


def test_a_template_of_its_own_is_kept(tmp_path, tiny_folder):
    own = pico_llm("llama", tmp_path / "own", tiny_folder, template=True, pad=True)
    _, before = load_backbone(own)
    _, after = load_backbone(_written(own, tmp_path / "theta"))
    assert after.chat_template == before.chat_template
    assert after.pad_token_id == before.pad_token_id is not None


def test_weights_keep_their_bits(llama, tmp_path):
    before = load_file(llama / "model.safetensors")
    after = load_file(_written(llama, tmp_path / "theta") / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {value.dtype for value in after.values()} == {torch.float32}


def test_parameters_follow_content(llama, tmp_path):
    first = backbone_parameters(BackboneSource(folder=str(llama)))
    assert first == backbone_parameters(BackboneSource(folder=str(llama)))
    assert backbone_parameters("tiny-random") == {"source": "tiny-random"}
    moved = shutil.copytree(llama, tmp_path / "moved")
    weights = load_file(moved / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    other = backbone_parameters(BackboneSource(folder=str(moved)))
    assert other["source"]["sha256"] != first["source"]["sha256"]


def test_weights_that_cannot_be_used_are_refused(llama, tmp_path):
    old = pickled(llama, tmp_path / "old")
    problem = str(backbone_problem(BackboneSource(folder=str(old))))
    assert "pickled weights only (pytorch_model.bin)" in problem
    bare = shutil.copytree(llama, tmp_path / "bare")
    weights = load_file(bare / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GraftlineError, match=r"missing keys.*layers\.1\.mlp\.up_proj"):
        _written(bare, tmp_path / "theta")
    assert "no such folder" in str(backbone_problem(BackboneSource(folder=str(tmp_path / "x"))))
    assert "cannot be read" in str(backbone_problem(BackboneSource(gguf=str(tmp_path / "x.gguf"))))


def test_hub_names_are_pinned():
    free = BackboneSource(name="meta-llama/Meta-Llama-3-8B-Instruct")
    assert "not pinned" in str(backbone_problem(free))
    assert backbone_name(free).endswith("@unpinned")
    pinned = BackboneSource(name="a/b", revision=COMMIT)
    assert backbone_problem(pinned) is None
    assert backbone_name(pinned) == f"a/b@{COMMIT}"


def test_python_beside_a_backbone_is_never_run(llama, tmp_path):
    remote = shutil.copytree(llama, tmp_path / "remote")
    config = json.loads((remote / "config.json").read_text())
    config |= {"model_type": "own-llm", "auto_map": {"AutoConfig": "own.Config"}}
    (remote / "config.json").write_text(json.dumps(config))
    (remote / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(GraftlineError, match=r"Python of its own|no model that this"):
        _written(remote, tmp_path / "theta")


def test_a_damaged_gguf_is_named(tmp_path):
    file = tmp_path / "own.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    recorded = backbone_parameters(BackboneSource(gguf=str(file)))["source"]
    with pytest.raises(GraftlineError, match="own.gguf: cannot be read as a causal LM"):
        write_own_backbone(recorded, tmp_path / "theta")


def test_a_model_that_takes_no_embeddings_is_refused():
    class Odd(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return input_ids

    with pytest.raises(
        GraftlineError, match="Odd cannot be a backbone.*inputs_embeds, position_ids"
    ):
        _check_interface(Odd(), "odd")
