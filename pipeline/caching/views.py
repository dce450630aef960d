"""The views of the corpus that a configuration's teachers and its student are shown."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rekindle.data.corpus.corpus import Corpus
from rekindle.data.errors import InputError
from rekindle.data.storage.store import open_store
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.pairs import FEW_PAIRS, PairView, count_sequences, few_pairs_warning
from rekindle.data.views.plain import Clean, Text
from rekindle.data.views.reader import ViewReader
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.progress import Progress
from rekindle.pipeline.teacher_config import TeacherConfig


@dataclass(frozen=True)
class Views:
    """The views that the configured teachers and student need."""

    masked: MaskedView | None = None
    pairs: dict[str, PairView] = field(default_factory=dict)  # by the kind of pairs

    def shown_to(self, teacher: TeacherConfig) -> str:
        """Return the name of what a teacher is shown: one of these views, or the corpus itself."""
        if teacher.sees_masks and self.masked is not None:
            return self.masked.name
        if teacher.pair_expert and teacher.pairs in self.pairs:
            return self.pairs[teacher.pairs].name
        return (Clean if teacher.vocabulary else Text).kind


def build_views(corpus: Corpus, config: RunConfig, progress: Progress) -> Views:
    """Write the views that the configuration asks for, or their missing parts.

    Masks of policy hard come later: a teacher's losses on the text decide them.
    """
    masked = None
    maskable = corpus.info["tokenizer"]["mask_id"] is not None
    if not maskable and (needing := config.needs_masks) is not None:
        raise InputError(
            f"{config.corpus.tokenizer} has no mask token, so nothing can be masked, as {needing} "
            "needs it. Use a tokenizer with one; a student that learns only from classifiers "
            "(train.objective.hard.weight: 0) needs none"
        )
    if maskable and config.uses_masks and config.cache.mask.policy != "hard":
        masked = MaskedView(corpus, config.cache.mask, config.cache.seed, config.cache.replicas)
        with progress.task("masks", unit="sequences"):
            masked.build()
    kinds = sorted({t.pairs for t in config.teachers if t.pair_expert and t.pairs})
    # the corpus of a plan lies elsewhere
    store, seed = open_store(config.cache.path), config.cache.seed
    pairs = {str(kind): PairView.as_stored(corpus, kind, seed, store) for kind in kinds}
    for view in pairs.values():
        with progress.task(f"pairs ({view.pairs})", unit="sequences"):
            view.build()
    return Views(masked, pairs)


def few_pairs_warnings(
    corpus: Corpus, views: Views, teachers: Sequence[TeacherConfig]
) -> list[str]:
    """Return a line for each of ``teachers`` that finds too few pairs in ``corpus``."""
    warnings = []
    for teacher in teachers:
        view = views.pairs.get(teacher.pairs or "")
        if view is None or not teacher.pair_expert:
            continue
        possible = count_sequences(corpus, teacher.domains)
        pair_count = ViewReader(corpus, view.name).count_pairs(
            teacher.domains, FEW_PAIRS * possible
        )
        warnings.append(few_pairs_warning(teacher.name, view.pairs, pair_count, possible))
    return [line for line in warnings if line]
