"""Which dtype a device computes in, where that is not the dtype of a backbone's weights on disk."""

from __future__ import annotations

import torch


def computing_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which a backbone's products are fast.

    A CPU without AVX-512 or AMX, as most laptops have, multiplies bfloat16 number by number: on two
    cores with AVX2 a fine-tuning step of the starter took 17 times as long as in float32. There
    the weights are widened when they are read, which changes none, and rounded when they are
    written; between, each is its own fp32 master.

    Args:
        stored: of the weights on disk, as the recipe's `precision` says.
        device: as torch names it.
    """
    slow = stored == torch.bfloat16 and torch.device(device).type == "cpu"
    return torch.float32 if slow and not _cpu_multiplies_bfloat16() else stored


def _cpu_multiplies_bfloat16() -> bool:
    """Whether torch has more than a plain loop for it; torch asks itself the same."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
