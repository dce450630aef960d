"""All kinds of targets, by their names in ``teacher.json``."""

from rekindle.data.targets.kinds.base import TargetKind, VocabularyKind
from rekindle.data.targets.kinds.dense import Dense
from rekindle.data.targets.kinds.embedding import Embedding
from rekindle.data.targets.kinds.hidden import Hidden
from rekindle.data.targets.kinds.random import Random
from rekindle.data.targets.kinds.sequence import SequenceLogits
from rekindle.data.targets.kinds.tails import Tails
from rekindle.data.targets.kinds.threshold import Threshold
from rekindle.data.targets.kinds.token import TokenLogits
from rekindle.data.targets.kinds.topk import TopK
from rekindle.data.targets.schema import TeacherInfo

VOCABULARY_KINDS: dict[str, type[VocabularyKind]] = {
    kind.name: kind for kind in (TopK, Threshold, Random, Dense, Hidden)
}
KINDS: dict[str, type[TargetKind]] = VOCABULARY_KINDS | {
    kind.name: kind for kind in (Tails, SequenceLogits, TokenLogits, Embedding)
}


def kind_of(info: TeacherInfo) -> TargetKind:
    """Return the kind of the targets that ``info`` describes."""
    return KINDS[info.kind](info)


def vocabulary_kind(info: TeacherInfo) -> VocabularyKind:
    """Return the kind of a teacher whose targets are distributions over the vocabulary."""
    return VOCABULARY_KINDS[info.kind](info)
