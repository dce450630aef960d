"""``tails``: an extension of a topk teacher with the mass outside its ids at more temperatures.

On disk: ``tail_log_odds`` int16 [P,T], beside the part that ``extends`` names.
"""

import pyarrow as pa

from rekindle.data.targets.codec_compact import Widths
from rekindle.data.targets.kinds.base import TargetKind
from rekindle.data.targets.schema import VOCABULARY_TASKS


class Tails(TargetKind):
    """Only tail masses."""

    name = "tails"
    template = "the mass outside the ids of another part"
    tasks = VOCABULARY_TASKS
    needs = ()
    codecs = ("default", "precise")
    needs_temperatures = is_extension = True

    def memory_columns(self) -> Widths:
        """Return the columns as they are used, without ``positions``."""
        return {"tail_log_odds": (pa.int16(), len(self.info.temperatures))}
