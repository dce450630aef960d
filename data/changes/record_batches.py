"""How many rows the record batches of a teacher's targets have, by codec."""

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import unusable
from rekindle.data.storage.commits import ROWS_PER_BATCH
from rekindle.data.targets.codec_compact import compact_rows
from rekindle.data.targets.codec_registry import CODECS
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.reader import ViewReader


def rows_of_codec(corpus: Corpus, info: TeacherInfo, codec: str) -> int:
    """Return the rows that the writer of the targets would have used with that codec."""
    if not CODECS[codec].is_compressed:
        return ROWS_PER_BATCH
    share = 1.0
    if info.view_class.masked:
        message = f"{corpus.store.location}/views/{info.view} does not say how much is masked"
        with unusable(message, KeyError, TypeError, ValueError, AttributeError):
            masks = ViewReader(corpus, info.view).identity["mask"]
            hard = masks["policy"] == "hard" and info.imported is None
            share = float((masks["limit"] or 1.0) if hard else masks.get("probability", 1.0))
    return compact_rows(corpus.info["config"]["sequence_length"] * share)
