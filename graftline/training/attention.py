"""Training a backbone's self-attention alone."""

from __future__ import annotations

from graftline.errors import GraftlineError
from graftline.model.loading import LoadedModel
from graftline.training.optimizer import ParameterGroup

PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn"})
"""What architectures call the linear layers of self-attention."""
_BLOCKS = frozenset({"self_attn", "attn", "attention"})


def attention_group(loaded: LoadedModel, rate: float) -> ParameterGroup:
    """The linear layers of the backbone's self-attention (arXiv 2510.08564: SA Proj.).

    Raises:
        GraftlineError: the architecture's attention layers have names that are not known.
    """
    chosen = [
        parameter
        for name, parameter in loaded.model.backbone.named_parameters()
        if PROJECTIONS & set(name.split(".")) and _BLOCKS & set(name.split("."))
    ]
    if not chosen:
        raise GraftlineError(
            "attention-only: this backbone has no self-attention layer named "
            f"{', '.join(sorted(PROJECTIONS))}; use another method."
        )
    return ParameterGroup("backbone", chosen, rate)
