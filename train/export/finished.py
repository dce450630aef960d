"""Make a finished run's directory a model directory, completely or not at all."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from rekindle.data.corpus.tokenizer import Tokenizer
from rekindle.data.storage.atomic import new_files, write_json
from rekindle.train.distributed import ParallelStudent
from rekindle.train.export.card import CARD_FILE, student_card
from rekindle.train.export.folder import longest_text
from rekindle.train.export.provenance import Provenance
from rekindle.train.export.sentence_folder import write_beside
from rekindle.train.model.unfinished import SUMMARY_FILE
from rekindle.train.record.sharded import write_student
from rekindle.train.record.working_copy import shown_folder

log = logging.getLogger("rekindle")


def make_model_directory(
    run: Path,
    student: ParallelStudent,
    about: Mapping[str, object],
    tokenizer: Tokenizer,
    best_elsewhere: Path | None,
    summary: Mapping[str, object],
    provenance: Provenance,
) -> None:
    """Make ``run`` a model directory; the ``summary``, written last, marks it as finished.

    Every process takes part; the main one writes, and each one writes its files of a sharded
    student.
    """
    world = student.world
    with ExitStack() as resources:  # the main process holds what is written until everything is
        staged = world.decide(lambda: resources.enter_context(new_files(run)))
        if student.sharded:
            write_student(student, staged, about)

        def finish() -> None:
            finished_student = student.student.finished()
            if not student.sharded:
                finished_student.save_pretrained(staged, about)
            tokenizer.save(str(staged))
            if message := write_beside(finished_student, longest_text(finished_student), staged):
                log.info("%s", message)
            card = student_card(finished_student, run, best_elsewhere, provenance).replace(
                str(run), shown_folder(run)
            )
            (staged / CARD_FILE).write_text(card, encoding="utf-8")
            resources.close()
            write_json(run / SUMMARY_FILE, summary)

        world.decide(finish)
