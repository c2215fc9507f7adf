"""What must be set before torch, transformers, MLflow or Prefect load."""

from __future__ import annotations

import os
import warnings

from graftline.memory import keep_freed_memory

_DEFAULTS = {
    "GOMP_SPINCOUNT": "20000",  # wait briefly, then sleep: endless spinning stalls shared machines
    "THP_MEM_ALLOC_ENABLE": "1",  # large pages: a fifth off the optimiser's memory passes
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # what a server misses is kept and told later
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",
}
_HARMLESS = (
    "The given NumPy array is not writable",  # encoders read media, and write into none
    ".*input example was not provided",  # a served model's signature is written by hand
    "`is_gradient_checkpointing` is deprecated",  # PEFT reads it, once
)
"""How warnings begin that no user can do anything about."""


def prepare(*, verbose: bool = False) -> None:
    """Sets what is not set; what the user set wins. `verbose` shows Prefect's own log lines."""
    if verbose:
        os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "INFO"
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    for message in _HARMLESS:
        warnings.filterwarnings("ignore", message)
    keep_freed_memory()
    os.environ.pop("MLFLOW_RUN_ID", None)  # an outer run's id would take our child runs over
