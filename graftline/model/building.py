"""One module is built at a time.

While `transformers` builds a model it changes torch's default dtype and its init functions for the
whole process. Steps that run beside each other in threads would see that: two models built at once
can leave bfloat16 as everybody's default. Nor can two threads import it, or its lazy names, at
once. What runs in training and answering names its dtypes.
"""

from __future__ import annotations

import threading

import transformers  # noqa: F401  # here, where no second thread can see it half imported

BUILDING = threading.RLock()
