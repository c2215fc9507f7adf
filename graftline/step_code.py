"""Which source files compute each kind of step, and digests of them.

A step's fingerprint holds the digest of its code, so a change of what computes an artifact makes
a new one, and a change of a comment does not. A file that was found to be missing here is added
with the digest that it had then, and counts from its first change on: what was computed before
stays valid.
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
_ROUTING = tuple(f"model/routing/{name}.py" for name in ("layers", "router", "weights"))
_MERGING = ("merging/backbones.py", "merging/running_average.py")
ADDED: dict[str, tuple[str, ...]] = {
    "features": ("data/wav.py", "model/clips.py"),
    "realign": ("training/passes.py",),
    "adapters": _ROUTING,
    "weighted-merge": _MERGING,
    "correct": _MERGING,
    "distil": ("training/passes.py",),
    "realign-masked": (*_MERGING, "model/routing/router.py", "training/passes.py"),
    "perplexity": ("evaluation/held_out.txt",),
}
"""What a kind of step depends on besides: each file counts once its digest begins otherwise
than `WHEN_ADDED`."""
WHEN_ADDED: dict[str, str] = {
    "data/wav.py": "de9466d612e8b21568b122ee0b46ee52",
    "evaluation/held_out.txt": "6d8f62e05dd0c28b75468b824d88882b",
    "merging/backbones.py": "0d8d2e35760d168212c3aa83063948e4",
    "merging/running_average.py": "bfacc26827d97f858f0eeb964513c3a4",
    "model/clips.py": "3f2f0b774f7c4ce481436c135884d85a",
    "model/routing/layers.py": "d3a1ef3e5c1857721fe4c944db6440a9",
    "model/routing/router.py": "44909935798b9f23b364d82c89b77d57",
    "model/routing/weights.py": "2e743194ebc7ef084c2967b9309679c8",
    "training/passes.py": "6a04e23213617c0cbf057cd580bfa0a7",
}


def code_digest(kind: str) -> str:
    """Digest of the source files that compute a kind of step."""
    listed = source_digest(*CODE[kind])
    added = {path: source_digest(path) for path in ADDED.get(kind, ())}
    changed = [each for path, each in added.items() if not each.startswith(WHEN_ADDED[path])]
    return sha256("\n".join([listed, *changed]).encode()).hexdigest() if changed else listed


@cache
def source_digest(*patterns: str) -> str:
    """Digest of files of the library, in code blind to comments, docstrings and formatting."""
    root = Path(__file__).parent
    digest = sha256()
    for pattern in patterns:
        for path in sorted(root.glob(pattern)):
            content = path.read_text(encoding="utf-8")
            code = _dump(ast.parse(content)) if path.suffix == ".py" else content
            digest.update(f"{path.relative_to(root).as_posix()}\n{code}\n".encode())
    return digest.hexdigest()


def _dump(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                node.body = body[1:]  # type: ignore[attr-defined]
    return ast.dump(tree, include_attributes=False)
