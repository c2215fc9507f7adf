"""What all parts of a recipe are made of, and how any phase of training is called."""

from __future__ import annotations

import os.path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Place = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A file or folder; `~` in front is the user's home, as in a shell."""
Split = Literal["train", "validation", "test"]


class Part(BaseModel):
    """Base of all recipe parts: frozen; an unknown key is an error, and so are NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PhaseSettings(Part):
    """One way of calling the training loop."""

    steps: int = Field(ge=1, description="optimiser steps")
    batch_size: int = Field(16, ge=1)
    learning_rate: float = Field(gt=0.0, description="peak, reached after the warm-up")
    warmup_fraction: float = Field(0.1, ge=0.0, lt=1.0)
    weight_decay: float = Field(0.0, ge=0.0)
    clip_norm: float = Field(1.0, gt=0.0, description="L2 norm that gradients are clipped to")
    checkpoint_every: int = Field(50, ge=1, description="steps between resumable checkpoints")
