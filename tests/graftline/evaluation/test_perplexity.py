from __future__ import annotations

import math

import pytest
import torch

from graftline.evaluation.perplexity import held_out_text, text_perplexity


def test_an_indifferent_model_is_as_perplexed_as_it_has_words(tiny) -> None:
    backbone, tokenizer = tiny
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert text_perplexity(backbone, tokenizer, "Some text.") == pytest.approx(len(tokenizer))


def test_is_exp_of_the_mean_loss_of_the_plain_model(tiny) -> None:
    backbone, tokenizer = tiny
    ids = tokenizer("Some text.", return_tensors="pt", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        expected = math.exp(float(backbone(input_ids=ids, labels=ids).loss))
    assert text_perplexity(backbone, tokenizer, "Some text.") == pytest.approx(expected, rel=1e-5)


def test_the_held_out_text_is_long_enough_to_mean_something() -> None:
    assert len(held_out_text().split()) > 500
