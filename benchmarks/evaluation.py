"""Answers a second: batches with a KV cache, beside `generate` one row after another, in one run.

Same expert, rows, prompts and length; greedy on both sides. Needs a finished run:

    graftline run params/starter.yaml
    python benchmarks/evaluation.py params/starter.yaml --rows 60
"""

from __future__ import annotations

import argparse
import json
import time

from tasks.environment import prepare

prepare()

import torch
from starter_parts import artifacts, expert

from graftline.data.examples import ExampleSet, question_batches
from graftline.evaluation.answering import answer_all
from graftline.model.loading import LoadedModel
from graftline.settings.reading import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("--modality", default="image")
    parser.add_argument("--rows", type=int, default=60, help="how many are answered one by one")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    loaded, examples = expert(
        arguments.modality, artifacts(recipe, arguments.modality), "validation"
    )
    longest = recipe.evaluation.max_new_tokens
    answer_all(loaded, examples, batch_size=8, max_new_tokens=1, label="warm-up")
    started = time.perf_counter()
    batched = answer_all(
        loaded, examples, batch_size=recipe.evaluation.batch_size, max_new_tokens=longest, label=""
    )
    batched_rate = len(examples) / (time.perf_counter() - started)
    chosen = range(0, len(examples), max(1, len(examples) // arguments.rows))
    started = time.perf_counter()
    single = one_by_one(loaded, examples, list(chosen), longest)
    single_rate = len(single) / (time.perf_counter() - started)
    result = {
        "answers_per_second": {"batched": batched_rate, "one by one": single_rate},
        "ratio": round(batched_rate / single_rate, 1),
        "same_answers": sum(batched[row] == text for row, text in single.items()),
        "compared": len(single),
    }
    print(json.dumps(result, indent=2))


@torch.inference_mode()
def one_by_one(
    loaded: LoadedModel, examples: ExampleSet, rows: list[int], longest: int
) -> dict[int, str]:
    """What one would write first: `generate`, a row at a time (with its own KV cache)."""
    batches = question_batches(examples, 1)
    answers = {}
    for (row,), batch in batches:
        if row in rows:
            tokens = loaded.model.backbone.generate(
                inputs_embeds=loaded.model.embed(batch),
                attention_mask=batch.attention_mask,
                max_new_tokens=longest,
                do_sample=False,
                pad_token_id=loaded.prompts.pad_id,
            )
            answers[row] = loaded.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    return answers


if __name__ == "__main__":
    main()
