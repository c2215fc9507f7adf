"""Which source files compute each kind of step, and digests of them.

A step's fingerprint holds the digest of its code, so a change of what computes an artifact makes
a new one, and a change of a comment does not.
"""

from __future__ import annotations

import ast
from functools import cache
from hashlib import sha256
from pathlib import Path

MODEL_CODE = (
    "model/attention.py",
    "model/backbone.py",
    "model/connectors.py",
    "model/loading.py",
    "model/multimodal.py",
    "model/precision.py",
    "model/products.py",
    "model/prompts.py",
    "data/examples.py",
    "data/features.py",
    "team.py",
)
TRAINING_CODE = (
    *MODEL_CODE,
    "training/loop.py",
    "training/lora.py",
    "training/optimizer.py",
    "training/phases.py",
    "training/sharding.py",
)
GUARDED_CODE = (
    *TRAINING_CODE,
    "training/attention.py",
    "training/distillation.py",
    "training/elastic.py",
    "training/guarded.py",
    "training/memory.py",
    "training/objective.py",
    "training/orthogonal.py",
)
DISTILLING_CODE = (
    *TRAINING_CODE,
    "training/distillation.py",
    "training/objective.py",
    "evaluation/answering.py",
    "realignment/distilling.py",
    "realignment/statistics.py",
)
ANSWERING_CODE = (*MODEL_CODE, "evaluation/answering.py", "evaluation/scoring.py")
CODE: dict[str, tuple[str, ...]] = {
    "bundle": (),  # a copy: depends on its content alone
    "backbone": ("model/backbone.py",),
    "rows": (),  # known by their content, whatever imported them
    "features": (
        "data/rows.py",
        "data/features.py",
        "data/shares.py",
        "model/encoders.py",
        "model/efficientnet.py",
        "model/whisper.py",
        "model/point_sets.py",
    ),
    "align": TRAINING_CODE,
    "fine-tune": TRAINING_CODE,
    "realign": TRAINING_CODE,
    "guarded-fine-tune": GUARDED_CODE,
    "fisher": (*TRAINING_CODE, "training/elastic.py"),
    "logits": (*MODEL_CODE, "training/distillation.py", "training/memory.py"),
    "merge": ("merging/__init__.py", "merging/backbones.py", "merging/running_average.py"),
    "compose": ("merging/*.py",),
    "adapters": ("model/routing/adapters.py",),
    "weighted-merge": ("realignment/weighted_merge.py",),
    "statistics": (
        "model/connectors.py",
        "model/loading.py",
        "data/features.py",
        "realignment/statistics.py",
    ),
    "correct": ("model/connectors.py", "model/loading.py", "realignment/correction.py"),
    "distil": DISTILLING_CODE,
    "realign-masked": (
        *TRAINING_CODE,
        "model/routing/layers.py",
        "model/routing/weights.py",
        "realignment/decoupling.py",
    ),
    "evaluate": ANSWERING_CODE,
    "evaluate-joint": (*ANSWERING_CODE, "evaluation/joint.py"),
    "perplexity": (
        "model/attention.py",
        "model/precision.py",
        "model/products.py",
        "evaluation/perplexity.py",
    ),
}


def code_digest(kind: str) -> str:
    """Digest of the source files that compute a kind of step."""
    return source_digest(*CODE[kind])


@cache
def source_digest(*patterns: str) -> str:
    """Digest of source files of the library, blind to comments, docstrings and formatting."""
    root = Path(__file__).parent
    digest = sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            digest.update(f"{path.relative_to(root).as_posix()}\n{_dump(tree)}\n".encode())
    return digest.hexdigest()


def _dump(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree, include_attributes=False)
