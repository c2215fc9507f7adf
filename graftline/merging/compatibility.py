"""Which tensors of checkpoints belong together; all that stands against it, listed at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graftline.errors import GraftlineError
from graftline.merging.checkpoints import Checkpoint, vocabulary
from graftline.weight_files import Entry

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"
_SAMPLE_BYTES = 4096
_LISTED = 20  # of one kind of problem in one checkpoint


class CannotMergeCheckpoints(GraftlineError):
    """Checkpoints that do not belong together, or cannot be read."""

    def __init__(self, problems: Sequence[str]) -> None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s), nothing was written:\n{listed}")
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Job:
    """One tensor of the result.

    Attributes:
        name: in the result.
        base: where the base has it (or whoever keeps it).
        experts: where each expert has it; empty: `base` is copied bit by bit.
    """

    name: str
    base: Entry
    experts: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What a merge does, in the order in which the base lies on the disk."""

    jobs: tuple[Job, ...]
    warnings: tuple[str, ...]


def plan_merge(
    base: Checkpoint, experts: Sequence[Checkpoint], keep: Mapping[str, Checkpoint | None]
) -> Plan:
    """Decides for every tensor whether it is merged or kept.

    Merged: what the base and every expert have. Kept from the base: what only the base has, and
    what begins with a kept prefix (a tower, a projector); a prefix may be kept from a folder of
    its own instead.

    Args:
        base: theta_0.
        experts: at least one.
        keep: prefix -> whose tensors are kept under it; None: the base's.

    Raises:
        CannotMergeCheckpoints: lists everything that stands against it.
    """
    others = [checkpoint for checkpoint in keep.values() if checkpoint is not None]
    problems = [problem for c in (base, *experts, *others) for problem in c.problems]
    if not problems:
        problems += _quantised(base)
        kept, wrong = _kept(base, keep)
        problems += wrong
        jobs, warnings = _jobs(base, experts, kept, tuple(keep), problems)
        problems += [p for expert in experts for p in _vocabularies(base, expert, warnings)]
    if problems:
        raise CannotMergeCheckpoints(list(dict.fromkeys(problems)))
    return Plan(jobs, tuple(dict.fromkeys(warnings + _zero_vectors(base, experts, jobs))))


def _quantised(base: Checkpoint) -> list[str]:
    if "quantization_config" not in base.config:
        return []
    return [f"{base.folder}: is quantised; merge the weights it was made from instead"]


def _kept(
    base: Checkpoint, keep: Mapping[str, Checkpoint | None]
) -> tuple[dict[str, Entry], list[str]]:
    """The kept tensors by name, and prefixes under which there is none."""
    kept: dict[str, Entry] = {}
    problems = []
    for prefix, checkpoint in keep.items():
        owner = checkpoint or base
        found = {n: e for n, e in owner.entries.items() if n.startswith(prefix)}
        if not found:
            problems.append(f"{owner.folder}: no tensor begins with the kept prefix {prefix!r}")
            continue
        lost = sorted(n for n in base.entries if n.startswith(prefix) and n not in found)
        problems += _some(lost, f"{owner.folder}: lacks {{}}, which the base has under {prefix!r}")
        kept.update(found)
    return kept, problems


def _jobs(
    base: Checkpoint,
    experts: Sequence[Checkpoint],
    kept: Mapping[str, Entry],
    prefixes: tuple[str, ...],
    problems: list[str],
) -> tuple[tuple[Job, ...], list[str]]:
    """One job a tensor; adds to the problems what cannot be one."""
    warnings: list[str] = []
    tables = [_untied(base, expert, problems) for expert in experts]
    wanted = {name for name in base.entries if not name.startswith(prefixes)}
    shared = {name for name in wanted if any(name in table for table in tables)}
    for expert, table in zip(experts, tables, strict=True):
        problems += _missing_and_surplus(base, expert, table, shared, prefixes)
        for name in sorted(shared & table.keys()):
            problems += _misfits(name, base, expert, table[name], warnings)
    jobs = []
    for name, entry in sorted(base.entries.items(), key=lambda item: _place(item[1])):
        if name in shared and all(name in table for table in tables):
            if entry.floating:
                jobs.append(Job(name, entry, tuple(table[name] for table in tables)))
            else:
                jobs.append(Job(name, entry))
        else:
            jobs.append(Job(name, kept.get(name, entry)))
    new = sorted((n for n in kept if n not in base.entries), key=lambda n: _place(kept[n]))
    jobs += [Job(name, kept[name]) for name in new]
    if not any(job.experts for job in jobs) and not problems:
        problems.append(f"{base.folder}: shares no floating-point tensor with the experts")
    return tuple(jobs), warnings


def _place(entry: Entry) -> tuple[str, int]:
    return str(entry.file), entry.start


def _untied(base: Checkpoint, expert: Checkpoint, problems: list[str]) -> dict[str, Entry]:
    """The expert's tensors with its output embedding stored, or not, as the base stores it."""
    table = dict(expert.entries)
    for name in {n for n in (*base.entries, *table) if n.endswith(_HEAD)}:
        root = name.removesuffix(_HEAD)
        places = [n for n in table if n.startswith(root) and n.endswith(_EMBEDDING)]
        if (name in base.entries) == (name in table):
            continue
        if name not in base.entries and not base.tied:
            continue  # a surplus tensor like any other
        if expert.tied and name in table:
            del table[name]  # a copy of its input embedding
        elif expert.tied and len(places) == 1:
            table[name] = table[places[0]]
        elif name in table:
            problems.append(
                f"{expert.folder}: {name} is stored beside untied embeddings, the base ties "
                "them; untie the base or tie the expert first"
            )
            del table[name]
    return table


def _missing_and_surplus(
    base: Checkpoint,
    expert: Checkpoint,
    table: Mapping[str, Entry],
    shared: set[str],
    prefixes: tuple[str, ...],
) -> list[str]:
    """Tensors that other models have, and those that the base lacks."""
    missing = sorted(shared - table.keys())
    surplus = sorted(n for n in table.keys() - base.entries.keys() if not n.startswith(prefixes))
    renamed = _renamed(set(base.entries) - table.keys(), surplus)
    if renamed is not None:
        theirs, ours, count = renamed
        return [
            f"{expert.folder}: {count} tensors begin with {theirs!r} where the base has {ours!r}; "
            "rename them, or give the folder of the backbone alone"
        ]
    problems = _some(missing, f"{expert.folder}: lacks {{}}, which the base and others have")
    hint = "keep it with --keep PREFIX=FOLDER, or leave it out of the expert"
    return problems + _some(surplus, f"{expert.folder}: {{}} is not in the base; {hint}")


def _some(names: Sequence[str], text: str) -> list[str]:
    listed = [text.format(name) for name in names[:_LISTED]]
    rest = len(names) - _LISTED
    return [*listed, text.format(f"{rest} more")] if rest > 0 else listed


def _renamed(ours: set[str], theirs: Sequence[str]) -> tuple[str, str, int] | None:
    """The prefix that most of an expert's strange names have instead of the base's."""
    endings: dict[str, list[str]] = {}
    for name in ours:
        parts = name.split(".")
        for cut in range(min(4, len(parts) - 1)):
            endings.setdefault(".".join(parts[cut:]), []).append(".".join(parts[:cut]))
    votes: Counter[tuple[str, str]] = Counter()
    for name in theirs:
        parts = name.split(".")
        for cut in range(min(4, len(parts) - 1)):
            fronts = endings.get(".".join(parts[cut:]), [])
            if fronts:
                votes.update((".".join(parts[:cut]), front) for front in fronts)
                break
    if not votes:
        return None
    (front, instead), count = votes.most_common(1)[0]
    return (front, instead, count) if 2 * count > len(ours) else None


def _misfits(
    name: str, base: Checkpoint, expert: Checkpoint, theirs: Entry, warnings: list[str]
) -> list[str]:
    """What keeps one tensor of an expert from being merged with the base's."""
    ours, where = base.entries[name], f"{expert.folder}: {name}"
    if theirs.shape != ours.shape:
        same_width = theirs.shape[1:] == ours.shape[1:] and len(ours.shape) == 2
        rows = name.endswith((_HEAD, _EMBEDDING)) and same_width
        hint = (
            "; the vocabularies or their padding differ: resize one with resize_token_embeddings"
            if rows
            else ""
        )
        return [f"{where} has shape {list(theirs.shape)}, the base {list(ours.shape)}{hint}"]
    if ours.floating != theirs.floating or (not ours.floating and ours.dtype != theirs.dtype):
        return [f"{where} is {theirs.dtype}, the base's {ours.dtype}; they cannot be merged"]
    if not ours.floating and ours.read(0, ours.size) != theirs.read(0, theirs.size):
        return [f"{where} ({ours.dtype}) differs from the base's; only floats can be merged"]
    if ours.dtype != theirs.dtype:
        warnings.append(f"{expert.folder}: holds {theirs.dtype} where the base has {ours.dtype}")
    return []


def _vocabularies(base: Checkpoint, expert: Checkpoint, warnings: list[str]) -> list[str]:
    """Token numbers that mean something else to an expert; its own new tokens are a warning."""
    ours, theirs = vocabulary(base.folder), vocabulary(expert.folder)
    if ours is None or theirs is None or ours == theirs:
        return []
    moved = [token for token, number in theirs.items() if ours.get(token, number) != number]
    meanings = {number: token for token, number in ours.items()}
    moved += [t for t, n in theirs.items() if t not in ours and n in meanings]
    if moved:
        some = ", ".join(repr(token) for token in moved[:3])
        return [
            f"{expert.folder / 'tokenizer.json'}: {len(moved)} tokens ({some} ...) have other "
            "numbers than in the base, so rows of the embeddings mean different things"
        ]
    new = len(theirs.keys() - ours.keys())
    if new:
        warnings.append(f"{expert.folder}: its tokenizer has {new} tokens more; the base's is used")
    return []


def _zero_vectors(
    base: Checkpoint, experts: Sequence[Checkpoint], jobs: Sequence[Job]
) -> list[str]:
    """Warns of experts that are the base; compares samples first, all bytes only if they agree."""
    warnings = []
    merged = [job for job in jobs if job.experts]
    for index, expert in enumerate(experts):
        pairs = [(job.base, job.experts[index]) for job in merged]
        if expert.folder.resolve() == base.folder.resolve() or (
            all(a.dtype == b.dtype and _same_sample(a, b) for a, b in pairs)
            and all(_same_bytes(a, b) for a, b in pairs)
        ):
            warnings.append(f"{expert.folder}: equals the base (its task vector is zero)")
    folders = [expert.folder.resolve() for expert in experts]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    return warnings + [f"{folder}: is given more than once" for folder in twice]


def _same_sample(first: Entry, second: Entry) -> bool:
    middle = max(0, first.size // 2 - _SAMPLE_BYTES // 2)
    return all(
        first.read(place, _SAMPLE_BYTES) == second.read(place, _SAMPLE_BYTES)
        for place in (0, middle, max(0, first.size - _SAMPLE_BYTES))
    )


def _same_bytes(first: Entry, second: Entry, step: int = 1 << 22) -> bool:
    return all(
        first.read(place, step) == second.read(place, step) for place in range(0, first.size, step)
    )
