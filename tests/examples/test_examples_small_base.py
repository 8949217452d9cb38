"""examples/small_base.py: the base that the notebooks pretrain."""

import sys

import jax
import numpy as np
import pytest
from example_runs import needs_data
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import small_base
import training

pytestmark = [pytest.mark.examples, needs_data("THE NOTEBOOKS' BASE IS")]


def test_the_base_learns_its_language_better_than_another() -> None:
    tokenizer, data = small_base.load_data(("english", "spanish"))
    assert all(len(part) > 20 for parts in data.values() for part in parts)
    base = small_base.pretrain(tokenizer, data["english"], steps=30)
    apply = lambda variables, _, *args, **kwargs: base.model.apply(
        variables, *args, **kwargs
    )
    evaluate = jax.jit(training.make_loss(apply))

    def held_out_loss(language: str) -> float:
        rows = chat_data.all_batches(data[language][1], 8, small_base.LENGTH)[0]
        return float(evaluate({}, base.variables, rows)[0])

    guessing = np.log(small_base.CONFIG.vocab)
    english, spanish = held_out_loss("english"), held_out_loss("spanish")
    assert english < 0.9 * guessing
    assert english < spanish
