"""The train-student command: opens the cache, finds the student's view, runs the loop, shows it."""

from collections.abc import Mapping
from pathlib import Path

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.views import MaskedView
from rekindle.pipeline.config import RunConfig, dump_config
from rekindle.pipeline.progress import Progress
from rekindle.train.loop import TrainResult, train_student


def train_from_config(
    config: RunConfig, out: Path, *, resume: bool = False, progress: Progress | None = None
) -> TrainResult:
    """Train the configured student from the configured cache into ``out``; saves the configuration
    there.
    """
    if config.student is None:
        raise InputError("the configuration has no `student` section; add student.model")
    progress = progress or Progress.silent()
    cache = Cache.open(config.cache.path)
    view = None
    if config.student.task == "masked_lm":
        # The masks this configuration means: a cache may hold views of several.
        view = MaskedView(
            cache.corpus, config.cache.mask, config.cache.seed, config.cache.replicas
        ).name
    with progress.task(str(out), unit="steps", total=config.train.steps) as task:

        def report(step: int, values: Mapping[str, float]) -> None:
            task.advance(step - task.done, tokens=values["tokens"])
            terms = [f"{k} {v:.3f}" for k, v in values.items() if k in ("loss", "ce") or "kd/" in k]
            wait = f"wait {values['data_wait']:.1%}"
            task.note(" · ".join([*terms, task.rates(), wait]))

        result = train_student(
            cache,
            config.student,
            config.train,
            out,
            masked_view=view,
            resume=resume,
            report=report,
        )
    (out / "run.yaml").write_text(dump_config(config), encoding="utf-8")
    return result
