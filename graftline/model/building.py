"""One module is built at a time.

While `transformers` builds a model it changes torch's default dtype and its init functions for the
whole process. Steps that run beside each other in threads would see that: two models built at once
can leave bfloat16 as everybody's default. Nor can two threads import it, or its lazy names, at
once. What runs in training and answering names its dtypes.
"""

from __future__ import annotations

import threading
from typing import Any

import transformers  # noqa: F401  # here, where no second thread can see it half imported
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from transformers.utils import logging

BUILDING = threading.RLock()

_DOWNLOADS_SHOWN = not are_progress_bars_disabled()
_library: Any = logging
_library.disable_progress_bar()  # of reading weights, since steps have bars of their own
if _DOWNLOADS_SHOWN:
    enable_progress_bars()  # of downloads, which that silenced too
