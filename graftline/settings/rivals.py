"""Recipe sections of low-rank adapters, and of the methods that fine-tune against forgetting."""

from __future__ import annotations

from pydantic import Field

from graftline.recipe_parts import Part


class LoraSettings(Part):
    """Low-rank adapters on every linear layer of the backbone, folded in afterwards."""

    rank: int = Field(128, ge=1)
    alpha: float = Field(128.0, gt=0.0, description="MERA: alpha / rank = 1")


class EwcSettings(Part):
    """Elastic weight consolidation."""

    strength: float = Field(
        0.01, ge=0.0, description="lambda; a stage's Fisher is scaled to a mean of 1 first"
    )
    decay: float = Field(
        0.95, ge=0.0, le=1.0, description="gamma: what a stage keeps of the earlier ones' Fisher"
    )
    fisher_rows: int = Field(512, ge=1, description="training rows a stage's Fisher is read from")


class LwfSettings(Part):
    """Learning without forgetting."""

    strength: float = Field(1.0, ge=0.0, description="weight of the distillation")
    temperature: float = Field(2.0, gt=0.0, description="of both models' distributions")


class DerSettings(Part):
    """Dark experience replay."""

    alpha: float = Field(
        0.1,
        ge=0.0,
        description="weight of the replayed rows' logits: of the square's mean over the "
        "vocabulary, where the paper's 0.1 is for 10 to 200 classes",
    )
    beta: float = Field(0.5, ge=0.0, description="weight of their answers (DER++); 0: plain DER")


class OrthogonalLoraSettings(LoraSettings):
    """O-LoRA: one LoRA a stage, orthogonal to those before it."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(32.0, gt=0.0)
    strength: float = Field(0.5, ge=0.0, description="lambda_1: weight of the orthogonality")


class PathSettings(LoraSettings):
    """PathWeave: the LoRA that a modality's path adds."""

    rank: int = Field(8, ge=1)
    alpha: float = Field(32.0, gt=0.0)


class RivalSettings(Part):
    """Own settings of the methods that fine-tune against forgetting."""

    ewc: EwcSettings = EwcSettings()
    lwf: LwfSettings = LwfSettings()
    der: DerSettings = DerSettings()
    o_lora: OrthogonalLoraSettings = OrthogonalLoraSettings()
    pathweave: PathSettings = PathSettings()
