"""The kinds of connectors that a recipe can ask for, and how each is built from its record.

- `mlp`: `MixerConnector`, a straight path and a perceptron over all tokens at once
- `linear`: the same without its perceptron (its hidden layer has no units)
- `resampler`: `ResamplerConnector`
- of models that were taken apart: `ProjectorConnector`, which no recipe asks for

Records tell the kinds apart by their shape. Nothing of the starter's artifacts changes by a new
kind: parameters of `mlp` are what they were, and the code that reads connectors is in the
fingerprints of all training steps. So `register` puts the choice into `ConnectorRecord.build`
from here.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from graftline.model.building import BUILDING
from graftline.model.connectors import MixerConnector
from graftline.model.loading import ConnectorRecord
from graftline.model.projector import ProjectorConnector
from graftline.model.resampler import ResamplerConnector
from graftline.settings.models import ConnectorSettings
from graftline.step_code import source_digest

_RESAMPLED, _PROJECTED = "layers", "group"
"""What only a resampler's shape has, and only a projector's."""


def connector_parameters(settings: ConnectorSettings) -> dict[str, Any]:
    """What a plan records of a connector's kind and shape."""
    if settings.kind == "resampler":
        code = source_digest(
            "model/resampler.py", "model/connector_kinds.py", "training/resampling.py"
        )
        return {**settings.model_dump(), "code": code}
    hidden = settings.hidden if settings.kind == "mlp" else 0
    return {"tokens": settings.tokens, "hidden": hidden}


def build_connector(shape: Mapping[str, float | int]) -> MixerConnector:
    """A connector of a record's shape, weights not set; all kinds are used in the same way."""
    with BUILDING:
        if _RESAMPLED in shape:
            return cast(MixerConnector, ResamplerConnector(**shape))  # type: ignore[arg-type]
        if _PROJECTED in shape:
            return cast(MixerConnector, ProjectorConnector(**shape))  # type: ignore[arg-type]
        return MixerConnector(**shape)  # type: ignore[arg-type]


def _build(record: ConnectorRecord) -> MixerConnector:
    return build_connector(record.shape)


def register() -> None:
    """Lets records of every kind build their connector; harmless when called again."""
    # A linear connector has a layer without units, of which torch warns.
    warnings.filterwarnings("ignore", "Initializing zero-element tensors", UserWarning)
    ConnectorRecord.build = _build  # type: ignore[method-assign, assignment]


register()
