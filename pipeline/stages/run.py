"""Run several stages in order: for each, complete its cache, then train its student.

  OUT/stages.json   the definition: every stage's configuration, with references as written
  OUT/first/        a run as ``pipeline train-student`` leaves it

Everything that can be checked is checked before the first stage begins.
"""

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rekindle.data.cache import Cache
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.counted import counted
from rekindle.data.errors import CheckpointError, InputError
from rekindle.data.former import with_recorded_defaults
from rekindle.data.storage.atomic import write_json
from rekindle.pipeline.builtin.missing import make_missing
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.processes.units import Executor
from rekindle.pipeline.progress import SILENT, Progress
from rekindle.pipeline.several_runs import STAGES_FILE, check_same_runs, is_finished, read_runs
from rekindle.pipeline.stages.prompts import write_prompts
from rekindle.pipeline.stages.resolve import Ready, Stage, check_models, plan_stages, ready_parts
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.distributed import join_world
from rekindle.train.interrupts import Interrupted
from rekindle.train.loop import TrainResult
from rekindle.train.record.run_folder import is_continued, open_folder
from rekindle.train.record.stored_run import upload_definition

log = logging.getLogger("rekindle")


def run_stages(
    config: RunConfig, out: Path, *, resume: bool = False, progress: Progress = SILENT
) -> list[TrainResult]:
    """Run the stages of ``config`` into folders of ``out``. Return the results of those that ran.

    With ``resume``, finished stages are left alone and the interrupted one continues. Under
    torchrun the main process caches, and all of them train. Raise InputError for a mistake in any
    stage, and for an ``out`` in use, before anything runs; CheckpointError if ``resume`` meets
    stages of another configuration.
    """
    results = []
    with join_world() as world, ExitStack() as held:  # the main process locks the folder
        stages = world.agree(lambda: _planned(config, out, resume))
        folder = open_folder(out, lambda: _look(out, stages, resume))
        missing = world.decide(lambda: held.enter_context(folder), patient=True)
        record = {"stages": [stage.record for stage in stages]}
        world.decide(lambda: write_json(out / STAGES_FILE, record))
        world.decide(lambda: upload_definition(out / STAGES_FILE, resume))
        for stage in stages:
            if stage.name not in missing:
                log.info("stage %s is finished: %s", stage.name, stage.directory)
                continue
            log.info("stage %s (%d of %d)", stage.name, stages.index(stage) + 1, len(stages))
            with _naming(stage, stages):
                world.decide(functools.partial(_cache, stage, progress), patient=True)
                results.append(
                    train_from_config(stage.config, stage.directory, resume=True, progress=progress)
                )
    return results


@contextmanager
def _naming(stage: Stage, stages: Sequence[Stage]) -> Iterator[None]:
    """Add to an interrupt the ``stage`` it hit, and how many stages are finished."""
    try:
        yield
    except Interrupted as error:
        done = sum(is_finished(one.directory) for one in stages)
        told = f"; {done} of {counted(len(stages), 'stage')} are finished"
        told += f"; stage {stage.name}: interrupted{error.message}"
        raise Interrupted(told, is_saved=error.is_saved or done > 0) from None


def _cache(stage: Stage, progress: Progress) -> None:
    _write_text(stage)
    cache_teachers(stage.config, progress=progress)


def _write_text(stage: Stage) -> None:
    """Write the stage's corpus of prompts, if it has one."""
    if (prompts := stage.prompts) is not None:
        assert prompts.cache is not None
        how = prompts.model_dump(include={"template", "words", "confidence"})
        tokenizer, cache = load_tokenizer(stage.config.corpus.tokenizer), Cache.open(prompts.cache)
        counts = write_prompts(cache, prompts.teacher, prompts.to, tokenizer=tokenizer, **how)
        log.info("stage %s: %s: %s", stage.name, prompts.to, counts.as_text())


def _planned(config: RunConfig, out: Path, resume: bool) -> list[Stage]:
    """Return the stages, with the former defaults they were begun with."""
    recorded = (resume and read_runs(out, STAGES_FILE)) or {}
    stages = []
    for stage in plan_stages(config, out):
        begun = recorded.get(stage.name, {}).get("config", {})
        written = with_recorded_defaults(stage.written, begun, log_changes=False)
        stages.append(
            replace(stage, config=with_recorded_defaults(stage.config, begun), written=written)
        )
    return stages


# --- the directory --------------------------------------------------------------------------------


def _look(out: Path, stages: Sequence[Stage], resume: bool) -> list[str]:
    """Return the names of the stages that are not finished in ``out``.

    Stages that were not begun may have changed.
    """
    if is_continued(out, STAGES_FILE, "run of stages", resume):
        recorded = read_runs(out, STAGES_FILE) or {}
        begun = {name: _whole(old) for name, old in recorded.items() if (out / name).exists()}
        now = {stage.name: _whole(stage.record) for stage in stages}
        stranger = "has a stage {name!r}, which is not in the file"
        rule = "Resume it with its own configuration, or give another --out"
        configs = {stage.name: stage.config for stage in stages}
        check_same_runs(out, begun, now, stranger, rule, configs)
    missing = [stage.name for stage in stages if not is_finished(stage.directory)]
    _check_order(stages, missing)
    left = [stage for stage in stages if stage.name in missing]
    make_missing(*(stage.config for stage in left))
    check_models(left)
    return missing


def _whole(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stage's configuration with its prompts."""
    return {**record.get("config", {}), "write_prompts": record.get("write_prompts")}


def _check_order(stages: Sequence[Stage], missing: Sequence[str]) -> None:
    """Check that what a stage took from an earlier one is still there."""
    for stage in stages:
        gone = [name for name in stage.uses if name in missing]
        if gone and stage.directory.exists():
            raise CheckpointError(
                f"{stage.directory} was begun from the stage {gone[0]!r}, which is no longer "
                f"finished and would be made again. Remove {stage.directory}, or give another "
                "--out"
            )


# --- caching alone --------------------------------------------------------------------------------


@dataclass(frozen=True)
class CachedStage:
    """What was cached of one stage, and what waits for which stages."""

    ready: Ready
    done: StageOne | None  # None: nothing, because its text waits or others were asked for

    def as_text(self) -> str:
        """Return a line for what was done, and one for each thing that waits."""
        stage, lines = self.ready.stage, self.ready.waiting_text()
        if self.done is not None:
            path = stage.written.cache.path
            lines.insert(0, f"stage {stage.name}: {path}: {self.done.as_text()}")
        return "\n".join(lines)


def cache_stages(
    config: RunConfig,
    only: Sequence[str] = (),
    executor: Executor | None = None,
    progress: Progress = SILENT,
    check: bool | None = None,
) -> list[CachedStage]:
    """Run ``cache_teachers`` for every stage, as far as no student has to be trained first.

    ``only`` limits the work to teachers of those names, and to the stages with them.
    """
    stages = plan_stages(config, Path())
    known = {teacher.name for stage in stages for teacher in stage.config.teachers}
    if unknown := [name for name in only if name not in known]:
        raise InputError(
            f"no teacher {unknown[0]!r} in any stage (there are: {', '.join(sorted(known))})"
        )
    make_missing(config)
    check_models(stages, students=False)
    done = []
    for ready in ready_parts(stages):
        made, part = None, ready.config
        chosen = [t.name for t in part.teachers if t.name in only] if part else []
        if part and (chosen or not only):
            _write_text(ready.stage)
            made = cache_teachers(part, chosen, executor, progress, check)
        done.append(CachedStage(ready, made))
    return done
