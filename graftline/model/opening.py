"""A backbone opened by a recipe's words: its precision, its attention, its device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch

from graftline.model.attention import attention_for
from graftline.model.backbone import load_backbone
from graftline.model.precision import computing_dtype, products_are_faster_wide
from graftline.model.products import widen_products
from graftline.recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def open_backbone(
    folder: Path, precision: str, attention: str, device: str, place: str | None = None
) -> tuple[Any, Any]:
    """A backbone and its tokenizer, by a recipe's words.

    Args:
        folder: a `transformers` folder.
        precision: name of its weights' dtype on disk, in which `save_backbone` writes it again.
        attention: `auto`, or `transformers`' name of an implementation.
        device: where it computes, which chooses the dtype it computes in.
        place: where its weights go, if not there.
    """
    if attention == "auto":
        chosen = attention_for(folder, device)
        # Asked for by name, `sdpa` is refused by architectures without it (gemma2, gpt_oss); asked
        # for nothing, `transformers` takes it where there is one, else `eager`.
        attention = cast(str, None) if chosen == "sdpa" else chosen
    stored = DTYPES[precision]
    dtype = computing_dtype(stored, device)
    model, tokenizer = load_backbone(folder, dtype, attention, place or device)
    if products_are_faster_wide(dtype, device):
        widen_products(model)
    model.config.dtype = stored
    return model, tokenizer


def is_widened(recipe: Recipe) -> bool:
    """Whether backbones are computed in another dtype here than the recipe stores them in."""
    stored = DTYPES[recipe.precision]
    here = recipe.execution.where == "here"
    return here and computing_dtype(stored, device_named(recipe.execution.device)) != stored


def device_named(device: str) -> str:
    """The device itself where a recipe says `auto`."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def keep_convolutions_in_float32() -> None:
    """Has a GPU compute encoders' float32 convolutions as a CPU does.

    By itself torch takes TensorFloat-32 for them, with 10 bits of mantissa: features would be 1e-3
    apart under one fingerprint.
    """
    torch.backends.cudnn.allow_tf32 = False
