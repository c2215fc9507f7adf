"""Carrying out one step of a plan: find its artifact, or compute and publish it."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch

from graftline.asking.parts import Parts, load_parts
from graftline.data.examples import ROWS, ExampleSet
from graftline.data.parts import SMOLLM2, fetch
from graftline.durable import atomic_write_text
from graftline.errors import GraftlineError
from graftline.evaluation.answering import answer_all, answer_batches
from graftline.evaluation.joint import JointSet
from graftline.evaluation.perplexity import text_perplexity
from graftline.evaluation.scoring import QUESTION, score_rows
from graftline.merging.backbones import merge_backbones
from graftline.merging.streaming import MergeRequest, merge_checkpoints
from graftline.model.backbone import convert_gguf, make_tiny
from graftline.model.loading import LoadedModel
from graftline.model.own_backbone import write_own_backbone
from graftline.model.routing.adapters import write_adapters
from graftline.model.routing.layers import routable_parameters
from graftline.planning.history import TIMING
from graftline.planning.plan import Reference, Step
from graftline.progress import track
from graftline.recipe import LoraSettings
from graftline.sharing.store import SharedStore
from graftline.steps.features import features, rows_of
from graftline.steps.guarded import fisher, guarded_fine_tune, logits
from graftline.steps.realigning import (
    correct,
    distil,
    realign_masked,
    statistics,
    weighted_merge,
)
from graftline.steps.together import carried_out_together, carry_out_together
from graftline.steps.work import (
    Machine,
    Work,
    call_of,
    check_untouched,
    load,
    phase_settings,
    realign_settings,
    seen_share,
    set_pieces,
)
from graftline.store import Artifact, Store
from graftline.team import current
from graftline.training import phases
from graftline.training.resampling import align_resampler

_SESSION = "session.json"
_AT_ONCE = frozenset({"backbone", "merge", "weighted-merge", "perplexity", "statistics", "correct"})
"""Kinds without a loop that says how far it is: they are shown as one round, with their time."""


def execute(step: Step, store: Store, machine: Machine) -> Artifact:
    """Returns a step's artifact; computes it if it is not there.

    Raises:
        GraftlineError: a parent is missing or damaged, or the step itself fails; nothing is
            published then, and checkpoints are kept.
    """
    fingerprint = step.reference.fingerprint
    found = store.find(step.kind, fingerprint)
    if found is not None:
        return found
    parents: dict[str, Artifact] = {}
    for role, parent in step.parents.items():
        artifact = _found(store, role, parent)
        if artifact is None:
            raise GraftlineError(
                f"{step.label}: its {role} ({parent.kind} {parent.fingerprint[:12]}) is not in "
                f"the store; run the whole recipe."
            )
        parents[role] = artifact
    if step.kind == "features" and "rows" not in parents:
        parents |= rows_of(step, store, machine)

    def build(out: Path) -> None:
        started = time.monotonic()
        torch.set_num_threads(machine.threads)
        set_pieces(machine.torch_device)
        folder = store.work_folder(step.kind, fingerprint)
        # Of a shared store, checkpoints may be another machine's, and their times the copies'.
        earlier = 0.0 if isinstance(store, SharedStore) else begin_session(folder)
        shared = carried_out_together(step.kind, machine)
        shared &= step.kind != "features" or machine.feature_shares == 1
        run = carry_out_together if shared else RUNNERS[step.kind]
        with track(step.title, 1) if step.kind in _AT_ONCE else nullcontext() as advance:
            try:
                run(Work(step, parents, machine, folder, out))
            except torch.OutOfMemoryError as error:
                raise GraftlineError(
                    f"{step.title}: {machine.torch_device} has no memory left. Take "
                    "execution.slots: 1, a smaller batch_size, or execution.processes with "
                    "shard: true; what is finished is kept."
                ) from error
            finally:
                _free_gpu()
            if advance is not None:
                advance()
        _record_seconds(out / TIMING, time.monotonic() - started, earlier)

    return step.publish(store, build)


def begin_session(folder: Path) -> float:
    """Notes that work on a step begins; what comes after a kill begins another session.

    Args:
        folder: the step's work folder, which outlives a kill.

    Returns:
        Seconds that earlier sessions took up to their last checkpoint: what they did after it is
        done again, and counted then.
    """
    file, now = folder / _SESSION, time.time()
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    earlier = 0.0
    if before is not None:
        saved = [path.stat().st_mtime for path in folder.iterdir() if path != file]
        earlier = before["earlier"] + max(0.0, max(saved, default=0.0) - before["begun"])
    atomic_write_text(file, json.dumps({"begun": now, "earlier": earlier}))
    return earlier


def _free_gpu() -> None:
    """Gives memory back that torch keeps for this process's next step.

    With `execution.processes` the next one may be computed by others, which need it.
    """
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()  # models hold themselves in cycles
        torch.cuda.empty_cache()


def _found(store: Store, role: str, parent: Reference) -> Artifact | None:
    """A step's input; who needs a connector does not fetch the backbone that learned with it."""
    if role.startswith("connector."):
        return store.find_files(parent.kind, parent.fingerprint, "connector-")
    return store.find(parent.kind, parent.fingerprint)


def _record_seconds(file: Path, seconds: float, earlier: float) -> None:
    """Adds the whole step's duration to what it noted itself (a phase notes its loop's).

    Args:
        file: with what it noted.
        seconds: that this session took.
        earlier: what sessions before it took that were killed.
    """
    noted = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    timing = {"seconds": round(seconds, 3), **noted, "step_seconds": round(earlier + seconds, 3)}
    if earlier:
        timing["last_session_seconds"] = round(seconds, 3)
    file.write_text(json.dumps(timing), encoding="utf-8")


def _backbone(work: Work) -> None:
    source, out = work.step.parameters["source"], work.out / "backbone"
    if not isinstance(source, str):
        write_own_backbone(source, out)
    elif source == "tiny-random":
        make_tiny(out, seed=0)
    else:
        convert_gguf(fetch(SMOLLM2), out)


def _rows(work: Work) -> None:
    raise GraftlineError(
        f"{work.step.label}: what was imported is not in the store any more; run the recipe again, "
        "which imports it first"
    )


def _align(work: Work) -> None:
    parameters = work.step.parameters
    shape = parameters["connector"]
    align = align_resampler if shape.get("kind") == "resampler" else phases.align
    align(call_of(work), phase_settings(parameters), parameters["modality"], shape)


def _realign(work: Work) -> None:
    parameters = work.step.parameters
    modality = parameters["modality"]
    connector = work.role("connector")[modality]
    phases.realign(
        call_of(work),
        realign_settings(work),
        modality,
        connector,
        seen_share(work),
        parameters["part"],
    )


def _fine_tune(work: Work) -> None:
    parameters = work.step.parameters
    phases.fine_tune(
        call_of(work),
        phase_settings(parameters),
        {name: work.role("connector")[name] for name in parameters["modalities"]},
        mode=parameters["mode"],
        lora=LoraSettings(**parameters.get("lora", {})),
        connector_learning_rate=parameters["connector_learning_rate"],
        train_embeddings=parameters["train_embeddings"],
        result_fingerprint=work.step.reference.fingerprint,
    )


def _merge(work: Work) -> None:
    previous = work.parents["previous"].folder / "backbone"
    vanilla = work.parents["vanilla"].folder / "backbone"
    merge_backbones(previous, vanilla, work.step.parameters["stage"], work.out / "backbone")
    check_untouched(work)


def _compose(work: Work) -> None:
    parameters = work.step.parameters
    experts = work.role("expert")
    names = {
        work.parents[role].folder / "backbone": f"{parent.kind}/{parent.fingerprint}"
        for role, parent in work.step.parents.items()
    }
    request = MergeRequest(
        rule=parameters["rule"],
        base=work.parents["base"].folder / "backbone",
        experts=tuple(experts[name] / "backbone" for name in parameters["modalities"]),
        out=work.out / "backbone",
        parameters=parameters["parameters"],
        seed=parameters["seed"],
        names=names,
    )
    merge_checkpoints(request)
    order = json.dumps(parameters["modalities"])
    (work.out / "experts.json").write_text(order, encoding="utf-8")


def _adapters(work: Work) -> None:
    base, _ = load(work)
    expert = work.parents["expert"].folder / "backbone"
    count = len(routable_parameters(base))
    with track(work.step.title, count) as advance:
        rank = work.step.parameters["rank"]
        write_adapters(base, expert, rank, work.out / "backbone", lambda: advance(""))


def _evaluate(work: Work) -> None:
    parameters = work.step.parameters
    modality = parameters["modality"]
    loaded = _assembled(work)
    features = work.role("features")[modality]
    examples = ExampleSet(features, modality, parameters["split"], loaded.prompts)
    answers = answer_all(
        loaded,
        examples,
        batch_size=parameters["batch_size"],
        max_new_tokens=parameters["max_new_tokens"],
        label=work.step.title,
    )
    rows = examples.rows
    accepted = [row["answers"] for row in rows]
    _write_answers(
        work.out, [row["id"] for row in rows], [r["task"] for r in rows], answers, accepted
    )


def _evaluate_joint(work: Work) -> None:
    parameters = work.step.parameters
    loaded = _assembled(work)
    joint = JointSet(_with_questions(work), parameters["split"], loaded.prompts)
    answers = answer_batches(
        loaded,
        joint.batches(parameters["batch_size"]),
        max_new_tokens=parameters["max_new_tokens"],
        label=work.step.title,
    )
    _write_answers(work.out, joint.ids, joint.tasks, answers, joint.answers)


def _with_questions(work: Work) -> dict[str, Path]:
    """Features of the modalities that have questions; of captions no conversation is made."""
    import pyarrow.parquet as pq

    rows, folders = Path(work.step.parameters["split"]) / ROWS, work.role("features")
    return {
        name: folder
        for name, folder in folders.items()
        if QUESTION in pq.read_table(folder / rows, columns=["task"])["task"].to_pylist()
    }


def _write_answers(
    out: Path,
    ids: Sequence[str],
    tasks: Sequence[str],
    answers: Sequence[str],
    accepted: Sequence[Sequence[str]],
) -> None:
    if not current().first:
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = score_rows(tasks, answers, accepted)
    table = {"id": ids, "task": tasks, "answer": answers, "score": scores, "accepted": accepted}
    pq.write_table(pa.table(table), out / "answers.parquet")


def _assembled(work: Work) -> LoadedModel:
    """The backbone with the connectors among the parents, routed where there is something to."""
    given, base = work.step.parameters, work.parents.get("base")
    experts, adapters = work.role("expert"), work.role("adapters")
    parts = Parts(
        name=work.step.title,
        backbone=work.parents["backbone"].folder / "backbone",
        connectors=work.role("connector"),
        encoders={},
        precision=given["precision"],
        attention=given["attention"],
        system_prompt=given["system_prompt"],
        max_new_tokens=given["max_new_tokens"],
        base=base.folder / "backbone" if base else None,
        experts={modality: folder / "backbone" for modality, folder in experts.items()},
        adapters={modality: folder / "backbone" for modality, folder in adapters.items()},
        text=given.get("text", "merged"),
    )
    return load_parts(parts, work.machine.device)


def _perplexity(work: Work) -> None:
    model, tokenizer = load(work)
    value = {"perplexity": text_perplexity(model, tokenizer)}
    (work.out / "perplexity.json").write_text(json.dumps(value), encoding="utf-8")


def _bundle(work: Work) -> None:
    raise GraftlineError(
        f"{work.step.label} {work.step.parameters['digest'][:12]} is not in the store any more; "
        "run `graftline add` again."
    )


RUNNERS: dict[str, Callable[[Work], None]] = {
    "bundle": _bundle,
    "backbone": _backbone,
    "rows": _rows,
    "features": features,
    "align": _align,
    "fine-tune": _fine_tune,
    "guarded-fine-tune": guarded_fine_tune,
    "fisher": fisher,
    "logits": logits,
    "merge": _merge,
    "compose": _compose,
    "adapters": _adapters,
    "realign": _realign,
    "weighted-merge": weighted_merge,
    "statistics": statistics,
    "correct": correct,
    "distil": distil,
    "realign-masked": realign_masked,
    "evaluate": _evaluate,
    "evaluate-joint": _evaluate_joint,
    "perplexity": _perplexity,
}
