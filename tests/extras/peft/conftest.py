"""A small cache and students, for adapters that are trained."""

import pytest

from rekindle.data.cache import Cache
from testlib.models import AUTO, NARROW


@pytest.fixture(scope="session")
def taught(tmp_path_factory, make_model, make_teacher, make_cache, wordpiece):
    """taught(task) -> a cache of 12 sequences with a language model and a classifier, and a student
    directory with dropout and 7 rows that are no tokens.
    """
    from rekindle.data.corpus.tokenizer import load_tokenizer

    made = {}

    def make(task):
        if task not in made:
            family, narrow = ("bert", NARROW) if task == "masked_lm" else ("llama", {})
            kept = {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]}
            teachers = [
                make_teacher("lm", task, 1, narrow, targets=kept),
                make_teacher("sense", "sequence_classification", 2, NARROW | {"num_labels": 3}),
            ]
            path = tmp_path_factory.mktemp(task) / "cache"
            make_cache(path, teachers)
            size = load_tokenizer(str(wordpiece)).size + 7
            made[task] = (
                path,
                make_model(family, AUTO[task], wordpiece, 10, **narrow, vocab_size=size),
            )
        path, student = made[task]
        return Cache.open(path), student

    return make
