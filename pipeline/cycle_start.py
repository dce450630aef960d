"""The model that everything in a cycle begins as: whether it can be that, before anything runs."""

from typing import Any

from rekindle.data.errors import InputError
from rekindle.data.tokenizer import load_tokenizer
from rekindle.pipeline.cycle_config import CycleConfig

# What is in front of a classifier's logits, and no masked LM has: students begin without it.
_HEADS = ("pooler.", "classifier.")


def check_start(config: CycleConfig) -> dict[str, Any]:
    """What ``cycle.json`` says of the start model: the fingerprint of its weights, and the names of
    those that students do not take over.

    Raises InputError where there is no such model, no weights or no tokenizer of its own, or the
    corpus has another one: experts are fine-tuned with the model's, students see the corpus's.
    """
    from safetensors import SafetensorError, safe_open

    from rekindle.train.models import resolve_model, weights_fingerprint

    directory = resolve_model(config.student.model)
    own, theirs = load_tokenizer(str(directory)), load_tokenizer(config.corpus.tokenizer)
    if own.digest != theirs.digest:
        raise InputError(
            f"student.model {config.student.model!r} has another tokenizer than corpus.tokenizer "
            f"{config.corpus.tokenizer!r} ({own.size:,} tokens against {theirs.size:,}, or other "
            "tokens under the same ids): the student would read other words. Name the model's own"
        )
    weights = weights_fingerprint(directory)
    names: set[str] = set()
    for file in directory.glob("*.safetensors"):
        try:
            with safe_open(file, framework="numpy") as tensors:
                names.update(tensors.keys())
        except SafetensorError as error:
            raise InputError(f"{file} cannot be read ({error}); save the model again") from None
    left = sorted(name for name in names if any(part in name for part in _HEADS))
    return {"weights": weights, "not_in_students": left}
