from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from graftline.data.parts import SMOLLM2, fetch
from graftline.errors import GraftlineError
from graftline.model.backbone import convert_gguf, load_backbone, make_tiny


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    make_tiny(tmp_path / "tiny", seed=0)
    return tmp_path / "tiny"


def _change(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    for name, value in changes.items():
        key = name.replace("__", ".")
        if value is None:
            del state[key]
        else:
            state[key] = value
    save_file(state, path, metadata={"format": "pt"})


def test_tiny_is_small_tied_and_deterministic(tiny: Path, tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    make_tiny(tmp_path / "again", seed=0)
    make_tiny(tmp_path / "other", seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [tmp_path / name / "model.safetensors" for name in ("tiny", "again", "other")]
    assert weights[0].read_bytes() == weights[1].read_bytes() != weights[2].read_bytes()
    model, _ = load_backbone(tiny)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) < 150_000


def test_tiny_tokenizer_round_trips_and_speaks_chatml(tiny: Path) -> None:
    _, tokenizer = load_backbone(tiny)
    text = "Zwölf Boxkämpfer, 漢字!\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("ab", add_special_tokens=False)) == 2
    turn = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]


def test_missing_key_is_named(tiny: Path) -> None:
    _change(tiny, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(GraftlineError, match=r"missing.*layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(tiny)


def test_unexpected_key_is_named(tiny: Path) -> None:
    _change(tiny, model__layers__0__mlp__extra__weight=torch.zeros(3))
    with pytest.raises(GraftlineError, match=r"unexpected.*layers\.0\.mlp\.extra\.weight"):
        load_backbone(tiny)


def test_mismatched_key_is_named(tiny: Path) -> None:
    _change(tiny, model__norm__weight=torch.ones(63))
    with pytest.raises(GraftlineError, match=r"mismatched.*model\.norm\.weight"):
        load_backbone(tiny)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_named(tiny: Path, value: float) -> None:
    norm = torch.ones(64, dtype=torch.bfloat16)
    norm[7] = value
    _change(tiny, model__layers__0__input_layernorm__weight=norm)
    with pytest.raises(GraftlineError, match=r"layers\.0\.input_layernorm\.weight.*NaN"):
        load_backbone(tiny)


def test_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(GraftlineError, match="nowhere"):
        load_backbone(tmp_path / "nowhere")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF no")
    with pytest.raises(GraftlineError, match=r"bad\.gguf"):
        convert_gguf(tmp_path / "bad.gguf", tmp_path / "out")


@pytest.mark.slow
def test_smollm2_converts_loads_and_knows_paris(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    convert_gguf(fetch(SMOLLM2), tmp_path)
    model, tokenizer = load_backbone(tmp_path)
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        turn, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt["input_ids"].shape[1] :])
