"""Fingerprints and manifests depend on what they name, not on the order in which it is given."""

from __future__ import annotations

import json
import random
import re
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from graftline.manifest import MANIFEST, canonical_json, fingerprint_of
from graftline.store import Store

PARENTS = {"backbone": "a1", "expert": "b2"}


def build(folder: Path) -> None:
    """Build the least that a manifest can tell of."""
    (folder / "a.bin").write_bytes(b"0123456789")


plain_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)
mappings = st.dictionaries(st.text(max_size=4), plain_data, max_size=6)


def shuffled(value: Any, generator: random.Random) -> Any:
    """Copy plain data with every mapping in another order."""
    if isinstance(value, dict):
        items = [(key, shuffled(part, generator)) for key, part in value.items()]
        generator.shuffle(items)
        return dict(items)
    return [shuffled(part, generator) for part in value] if isinstance(value, list) else value


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mappings, st.randoms(use_true_random=False))
def test_fingerprints_do_not_depend_on_the_order_of_keys(
    parameters: dict[str, Any], generator: random.Random
) -> None:
    parents = {"a": "1", "b": "2", "c": "3"}
    names = {
        fingerprint_of("merge", parameters=parameters, parents=parents, code="c"),
        fingerprint_of(
            "merge",
            parameters=shuffled(parameters, generator),
            parents=shuffled(parents, generator),
            code="c",
        ),
    }
    assert len(names) == 1
    assert json.loads(canonical_json(parameters)) == parameters
    changed = {**parameters, "one more key": 1}
    assert fingerprint_of("merge", parameters=changed, parents=parents, code="c") not in names


@settings(max_examples=8, deadline=None, derandomize=True)
@given(mappings, st.randoms(use_true_random=False))
def test_manifests_do_not_depend_on_the_order_of_keys(
    parameters: dict[str, Any], generator: random.Random
) -> None:
    texts = []
    for given_parameters in [parameters, shuffled(parameters, generator)]:
        with tempfile.TemporaryDirectory() as folder:
            artifact = Store(folder).publish(
                "merge",
                "f1",
                parameters=given_parameters,
                parents=shuffled(PARENTS, generator),
                code="c",
                build=build,
            )
            text = (artifact.folder / MANIFEST).read_text()
            texts.append(re.sub(r'"created": "[^"]*"', "", text))
    assert texts[0] == texts[1]


def test_fingerprints_tell_every_part_apart() -> None:
    base: dict[str, Any] = {"parameters": {"k": 1}, "parents": {"p": "a"}, "code": "c"}
    names = [
        fingerprint_of("merge", **base),
        fingerprint_of("align", **base),
        fingerprint_of("merge", **(base | {"parameters": {"k": 2}})),
        fingerprint_of("merge", **(base | {"parents": {"q": "a"}})),
        fingerprint_of("merge", **(base | {"code": "d"})),
    ]
    assert len(set(names)) == len(names)
