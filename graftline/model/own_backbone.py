"""A backbone of the user's own as theta_0: any causal LM of `transformers`, or a GGUF file."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graftline.errors import GraftlineError
from graftline.model.backbone import convert_gguf, load_backbone, save_backbone
from graftline.model.building import BUILDING
from graftline.model.pretrained import (
    file_digest,
    folder_of,
    identity,
    needs_remote_code,
    pin_problem,
)
from graftline.settings.models import BackboneSource
from graftline.step_code import source_digest

# For an LLM without a chat template: what a base model can follow, and a turn's end is its own.
PLAIN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\\n' }}"
    "{% elif message['role'] == 'user' %}{{ 'USER: ' + message['content'] + '\\n' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'] + eos_token + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT: ' }}{% endif %}"
)
_ARGUMENTS = ("inputs_embeds", "attention_mask", "position_ids", "logits_to_keep")
"""What the multimodal model calls a backbone with."""


def backbone_parameters(source: str | BackboneSource) -> dict[str, Any]:
    """What a plan records of theta_0: a starter's name alone, or the weights' identity and code.

    Raises:
        GraftlineError: a folder or file is not there, or holds no safetensors weights.
    """
    if isinstance(source, str):
        return {"source": source}
    if source.gguf is not None:
        recorded = {"gguf": source.gguf, "sha256": file_digest(Path(source.gguf))}
    else:
        recorded = identity(source)
    return {"source": recorded, "code": source_digest("model/own_backbone.py")}


def backbone_name(source: str | BackboneSource) -> str:
    """What people read: the starter's name, `name@commit`, a folder or a file."""
    if isinstance(source, str):
        return source
    if source.name is not None:
        return f"{source.name}@{source.revision or 'unpinned'}"
    return str(source.folder or source.gguf)


def backbone_problem(source: str | BackboneSource) -> str | None:
    """What stands in the way of a backbone, as far as it is known without fetching it."""
    if isinstance(source, str):
        return None
    problem = pin_problem(source)
    if problem is None:
        try:
            backbone_parameters(source)
        except GraftlineError as error:
            return str(error)
    return problem


def write_own_backbone(recorded: Mapping[str, Any], out: Path) -> None:
    """Writes theta_0 as one folder that everything else loads; weights keep their dtype.

    A tokenizer without a chat template gets `PLAIN_TEMPLATE`; one without a padding token needs
    none, since padding is masked.

    Args:
        recorded: by `backbone_parameters`, under `source`.
        out: folder to fill.

    Raises:
        GraftlineError: the weights are missing, pickled, not finite, do not belong to config.json,
            or are of a kind that takes no embeddings; names what.
    """
    if "gguf" in recorded:
        _write_gguf(Path(recorded["gguf"]), recorded["sha256"], out)
        return
    folder = folder_of(recorded)
    called = recorded.get("name") or str(folder)
    dtype = _stored_dtype(folder)
    try:
        model, tokenizer = load_backbone(folder, dtype, "eager")
    except GraftlineError as error:
        if needs_remote_code(folder):
            raise GraftlineError(
                f"{called}: its config.json names Python of its own. Such code is never run for a "
                f"backbone; take a model that `transformers` knows by itself ({error})"
            ) from error
        raise
    _check_interface(model, called)
    _check_tokenizer(tokenizer, called)
    save_backbone(model, tokenizer, out)
    _switch_off_dropout(out)


def _stored_dtype(folder: Path) -> torch.dtype:
    with BUILDING:
        from transformers import AutoConfig

        try:
            config: Any = AutoConfig.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            raise GraftlineError(
                f"{folder}: its config.json is of no model that this `transformers` knows ({error})"
            ) from error
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _check_interface(model: Any, called: str) -> None:
    known = inspect.signature(model.forward).parameters
    missing = [name for name in _ARGUMENTS if name not in known]
    if missing or model.get_output_embeddings() is None:
        raise GraftlineError(
            f"{called}: {type(model).__name__} cannot be a backbone, since its forward does not "
            f"take {', '.join(missing) or 'part in generation'}; take a decoder such as Llama, "
            "Qwen2, Mistral or Gemma"
        )


def _check_tokenizer(tokenizer: Any, called: str) -> None:
    if tokenizer.eos_token_id is None:
        raise GraftlineError(
            f"{called}: its tokenizer has no end-of-sequence token, which ends every answer; set "
            "eos_token in tokenizer_config.json"
        )
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE


def _write_gguf(path: Path, sha256: str, out: Path) -> None:
    """As `convert_gguf`, with the file's own chat template where it has one."""
    if file_digest(path) != sha256:
        raise GraftlineError(f"{path}: changed since the run was planned; run it again")
    try:
        convert_gguf(path, out)
    except GraftlineError as error:
        reason = error.__cause__ or error
        raise GraftlineError(f"{path}: cannot be read as a causal LM ({reason})") from error
    with BUILDING:
        from transformers import AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(
            str(path.parent), gguf_file=path.name, local_files_only=True
        )
    _check_tokenizer(tokenizer, str(path))
    tokenizer.save_pretrained(out)
    _switch_off_dropout(out)


def _switch_off_dropout(folder: Path) -> None:
    """Dropout draws anew in every process: a run that was resumed would end with other weights."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    rates = [(part, key) for part in parts for key in part if "drop" in key and _is_rate(part[key])]
    for part, key in rates:
        part[key] = 0.0
    if rates:
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _is_rate(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and value > 0
