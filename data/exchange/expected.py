"""Find where targets may be, to check rows and to know when an imported unit is complete, and which
view the model was shown.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rekindle.data.corpus.columns import word_characters
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError
from rekindle.data.exchange.config import ImportConfig
from rekindle.data.exchange.rows import Row
from rekindle.data.storage.columns import split_lists
from rekindle.data.storage.units import UnitPlace
from rekindle.data.targets.reading.reader import target_positions
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader
from rekindle.data.views.registry import view_kind


def expected_positions(
    corpus: Corpus, info: TeacherInfo, view: ViewReader | None, unit: UnitPlace
) -> list[NDArray[np.int64]]:
    """Return where each row of a unit has a language model's target, or an answer for a word."""
    if info.is_vocabulary:
        return target_positions(corpus, info, view, *unit)
    batches = [*corpus.shard(unit[0]).batches()]
    texts = [text for batch in batches for text in batch["text"].to_pylist()]
    starts = [split_lists(batches, name) for name in ("char_starts", "word_starts")]
    return [word_characters(*row)[0] for row in zip(texts, *starts, strict=True)]


def keep_trained(row: Row, tokens: int, expected: NDArray[np.int64]) -> Row:
    """Return a causal LM's row reduced to the ``expected`` positions, if it has values for each of
    its sequence's ``tokens`` that has a next one, as an engine gives them.
    """
    ids, predictions = row.get("ids"), tokens - 1
    is_one_list = isinstance(ids, list | tuple | np.ndarray) and row.get("positions") is None
    if not is_one_list or len(ids) != predictions or len(expected) == predictions:  # type: ignore[arg-type]
        return row

    def select(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: select(one) for key, one in value.items()}
        is_per_position = isinstance(value, list | tuple | np.ndarray) and len(value) == predictions
        return [value[index] for index in expected.tolist()] if is_per_position else value

    return {name: value if name == "input_ids" else select(value) for name, value in row.items()}


def may_have_targets(corpus: Corpus, view: ViewReader | None, shard: int) -> NDArray[np.bool_]:
    """Return which rows of a shard may have targets: in a view of pairs, those that have a pair. A
    student sees nothing of the others.
    """
    if view is None or not view.kind.paired:
        return np.ones(corpus.commits[shard].rows, bool)
    has_pair = [batch["text_a"].is_valid() for batch in view.batches(shard)]
    return np.concatenate([one.to_numpy(zero_copy_only=False) for one in has_pair])


def view_name(corpus: Corpus, config: ImportConfig) -> str:
    """Return the recorded name of the view that the model was shown."""
    kinds = ("masked", "pairs")
    stored = [name for name in corpus.store.folders("views") if view_kind(name).kind in kinds]
    default = {"causal_lm": "clean", "masked_lm": "masked"}.get(config.task, "text")
    requested = config.view or default
    if requested == "masked":
        masked = [name for name in stored if view_kind(name).masked]
        if len(masked) != 1:
            raise InputError(
                f"the cache has the masked views {masked or 'none'}; name the one that the model "
                "was shown (view), or `clean` if it saw the text unmasked"
            )
        requested = masked[0]
    is_possible = config.task in view_kind(requested).tasks
    if not is_possible or (view_kind(requested).stored and requested not in stored):
        known = ["clean", "text", *stored]
        possible = [name for name in known if config.task in view_kind(name).tasks]
        raise InputError(
            f"view {requested!r} cannot be shown to a {config.task} of this cache (possible are: "
            f"{', '.join(possible)})"
        )
    return requested
