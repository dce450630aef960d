"""The model that everything in a cycle begins as: whether it can be that, before anything runs."""

from typing import Any

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.pipeline.cycle.config import CycleConfig


def check_start(config: CycleConfig) -> dict[str, Any]:
    """What ``cycle.json`` says of the start model: the fingerprint of its weights.

    Raises InputError where there is no such model, no weights or no tokenizer of its own, or the
    corpus has another one: experts are fine-tuned with the model's, students see the corpus's.
    """
    from rekindle.train.model.files import resolve_model, weights_fingerprint

    directory = resolve_model(config.student.model)
    own, theirs = load_tokenizer(str(directory)), load_tokenizer(config.corpus.tokenizer)
    if own.digest != theirs.digest:
        raise InputError(
            f"student.model {config.student.model!r} has another tokenizer than corpus.tokenizer "
            f"{config.corpus.tokenizer!r} ({own.size:,} tokens against {theirs.size:,}, or other "
            "tokens under the same ids): the student would read other words. Name the model's own"
        )
    return {"weights": weights_fingerprint(directory)}
