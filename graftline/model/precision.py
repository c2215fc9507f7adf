"""In which arithmetic a device computes what a backbone's weights on disk are stored in."""

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


def products_are_faster_wide(dtype: torch.dtype, device: str) -> bool:
    """Whether a backbone's bfloat16 products are better taken in float32 (`widen_products`).

    Intel's cores multiply bfloat16 fast by AMX alone, which many virtual machines hide: there
    oneDNN's other kernels reached 95 GFLOP/s a core, and those of float32 180. What a CPU names
    decides, not a measurement, which another program's load could turn between two runs.

    Args:
        dtype: that `computing_dtype` gave.
        device: as torch names it.
    """
    if dtype != torch.bfloat16 or torch.device(device).type != "cpu":
        return False
    known: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # not in torch 2.7
    return str(known.get("cpu_name")).startswith("Intel") and not known.get("amx_bf16")


def _cpu_multiplies_bfloat16() -> bool:
    """Whether torch has more than a plain loop for it; torch asks itself the same."""
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
