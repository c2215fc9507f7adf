"""LoRA on every linear layer of the backbone (Hu et al., 2021), by `peft`, folded in afterwards."""

from __future__ import annotations

import torch
from torch import nn

from graftline.model.multimodal import MultimodalModel
from graftline.recipe import LoraSettings


def wrap_lora(model: MultimodalModel, settings: LoraSettings, seed: int) -> None:
    """Puts adapters into the backbone, in its own dtype, drawn from `seed` alone."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # peft only divides by the rank
        lora_dropout=0.0,
        bias="none",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model.backbone = get_peft_model(model.backbone, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if "lora_A" in name:
                drawn = torch.empty(parameter.shape, dtype=torch.float32)
                nn.init.kaiming_uniform_(drawn, a=5**0.5, generator=generator)
                parameter.copy_(drawn)
            elif "lora_B" in name:
                parameter.zero_()


def fold_lora(model: MultimodalModel) -> None:
    """Adds each adapter's product to the weight that it stands beside, and removes it."""
    model.backbone = model.backbone.merge_and_unload()
