"""The backbone LLM: converting it from GGUF, making a tiny one for tests, strict loading."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from graftline.errors import GraftlineError
from graftline.model.building import BUILDING

# ChatML, without a system turn unless a system message is given.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNKNOWN, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def convert_gguf(gguf_path: Path, out_folder: Path) -> None:
    """Convert a causal LM from GGUF to bf16 safetensors with its tokenizer.

    The chat template becomes ChatML without a default system turn, which would cost some twenty
    tokens a prompt and say nothing about media.

    Args:
        gguf_path: the ``.gguf`` file; its quantised weights are unpacked.
        out_folder: gets config, generation config, weights and tokenizer.

    Raises:
        GraftlineError: the file cannot be read as a causal LM.
    """
    with BUILDING:
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder, name = str(gguf_path.parent), gguf_path.name
    try:
        with BUILDING, _parsed_once():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=name,
                dtype=torch.float32,
                local_files_only=True,
                quantization_config=GgufConfig(dequantize=True),
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name, local_files_only=True)
    except Exception as error:
        raise GraftlineError(
            f"{gguf_path}: cannot be read as a causal LM ({error}); delete it so that it is "
            "fetched again"
        ) from error
    tokenizer.chat_template = CHAT_TEMPLATE
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = torch.bfloat16
    save_backbone(model, tokenizer, out_folder)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Keeps what `gguf` parses while `transformers` asks again, which takes most of the time.

    It reads the file three times (config, weights, tokenizer), and makes its table of tensor names
    anew for each module of the model.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(reader), cache(names)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names  # type: ignore[misc]


def _no_bars() -> None:
    """Loading and saving take less than a second; steps have bars of their own."""
    with BUILDING:
        from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]


def save_backbone(model: Any, tokenizer: Any, folder: Path) -> None:
    """Writes a causal LM, in the dtype that its config names, and its tokenizer.

    Args:
        model: a `transformers` causal LM. If it was widened, its weights are rounded in place, but
            for those that its architecture keeps in float32.
        tokenizer: its own.
        folder: where to; made if it is not there.
    """
    _no_bars()
    folder.mkdir(parents=True, exist_ok=True)
    if model.dtype != model.config.dtype:
        kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
        for name, parameter in model.named_parameters():
            if not any(each in name for each in kept):
                parameter.data = parameter.data.to(model.config.dtype)
    model.config._name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tiny_tokenizer() -> Any:
    """Byte-level BPE without merges: one token a byte, and three special ones in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with BUILDING:
        from transformers import PreTrainedTokenizerFast

    special = [UNKNOWN, TURN_START, TURN_END]
    letters = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[])
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        tokenizer.save(str(file))
        fast: Any = PreTrainedTokenizerFast
        wrapped = fast(
            tokenizer_file=str(file),
            unk_token=UNKNOWN,
            bos_token=TURN_START,
            eos_token=TURN_END,
            pad_token=TURN_END,
            clean_up_tokenization_spaces=False,
        )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def make_tiny(out_folder: Path, seed: int) -> None:
    """Make a tiny random Llama with a byte-level tokenizer, for tests.

    Hidden size 64, two layers, four heads, two key/value heads, tied embeddings, bf16. The global
    random state of torch is left as it was.

    Args:
        out_folder: gets config, generation config, weights and tokenizer.
        seed: of the weights.
    """
    with BUILDING:
        from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    model.config.dtype = torch.bfloat16
    save_backbone(model, tokenizer, out_folder)


def _check_keys(information: dict[str, Any], folder: Path) -> None:
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(str(key) for key in information.get(what) or ())
        if found:
            raise GraftlineError(
                f"{folder}: {what.replace('_', ' ')} in the weights of the backbone: "
                f"{', '.join(found[:5])} ({len(found)} in all). The weights do not belong to "
                "config.json; make the backbone again."
            )


def _check_finite(model: Any, folder: Path) -> None:
    for name, tensor in model.named_parameters():
        # A sum is NaN or infinite if any value is; only then is it looked at closely.
        if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(
            tensor.isfinite().all()
        ):
            raise GraftlineError(f"{folder}: the weight {name} holds NaN or infinite values")


def load_backbone(
    folder: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    attention: str = "eager",
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a causal LM and its tokenizer from a folder, strictly and without the network.

    Args:
        folder: what ``convert_gguf`` or ``make_tiny`` wrote, or any local ``transformers`` model.
        dtype: of the weights.
        attention: ``transformers``' name of an attention implementation.
        device: where the model goes.

    Returns:
        The model in eval mode and the tokenizer.

    Raises:
        GraftlineError: the folder is not a model, a key is missing, left over or of another
            shape, or a weight is not finite; names the key.
    """
    with BUILDING:
        from transformers import AutoModelForCausalLM, AutoTokenizer

    _no_bars()
    folder = Path(folder)
    auto: Any = AutoModelForCausalLM
    try:
        with BUILDING:
            model, information = auto.from_pretrained(
                str(folder),
                dtype=dtype,
                attn_implementation=attention,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are reported below, by name
                output_loading_info=True,
            )
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise GraftlineError(f"{folder}: not a readable backbone ({error})") from error
    _check_keys(information, folder)
    _check_finite(model, folder)
    return model.to(device).eval(), tokenizer
