"""The plan of one teacher: from its files if they are here, else from what is known.

Only the probe loads a model; nothing is downloaded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rekindle.data.corpus.config import hole_ids
from rekindle.data.corpus.tokenizer_files import is_gguf
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.extensions import plan_parts
from rekindle.pipeline.caching.teachers import TeacherPlan, configured, plan_teacher
from rekindle.pipeline.caching.views import Views
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.describing.encoders import check_of
from rekindle.pipeline.plan.figures import TeacherWork
from rekindle.pipeline.plan.probe import Probe
from rekindle.pipeline.plan.sample import CorpusSurvey
from rekindle.pipeline.plan.shared import Part, Pass, shared_passes
from rekindle.pipeline.plan.work import (
    bytes_of,
    foreseen_cut,
    positions_per_token,
    share_of,
    work_of,
)
from rekindle.pipeline.served.client import ServerAwayError
from rekindle.pipeline.served.config import ServedConfig
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.model.folder import HUB_ID, resolve_model
from rekindle.train.order.domains import check_domains


def plans_at_hand(
    config: RunConfig, survey: CorpusSurvey, views: Views, must_be: bool
) -> list[TeacherPlan | None]:
    """Describe every teacher whose model ``at_hand`` finds, before any of them is probed.

    ``views`` belong to ``survey.steps``. Raise InputError and CacheMismatchError as ``plan_run``.
    """
    folders = [
        Path() if teacher.served else at_hand(teacher.model, must_be, check_of(teacher))
        for teacher in config.teachers
    ]
    found: list[TeacherPlan | None] = []
    for teacher, folder in zip(config.teachers, folders, strict=True):
        found.append(None)
        with suppress(ServerAwayError):
            if folder is not None:
                found[-1] = described(teacher, folder, survey, views, config.cache.seed)
    return found


def plan_all_teachers(
    config: RunConfig,
    plans: Sequence[TeacherPlan | None],
    survey: CorpusSurvey,
    views: Views,
    probe: bool,
) -> tuple[TeacherWork, ...]:
    """Return what `pipeline cache-teachers` would do for each teacher; ``views`` belong to the
    steps.
    """
    found = []
    for teacher, plan in zip(config.teachers, plans, strict=True):
        infos = [plan.info if plan else _assumed(teacher, survey, views)]
        if plan and survey.present is not None:
            infos = [part.info for part in plan_parts(survey.present, plan)]
        parts = [(i, work_of(survey, config.cache, i.folder, i.view, i.domains)) for i in infos]
        found.append((plan, parts))
    shared = shared_passes(found)
    return tuple(
        _plan_one(teacher, plan, parts, config, survey, views, probe, shared.get(teacher.name))
        for teacher, (plan, parts) in zip(config.teachers, found, strict=True)
    )


def _plan_one(
    teacher: TeacherConfig,
    plan: TeacherPlan | None,
    parts: list[Part],
    config: RunConfig,
    survey: CorpusSurvey,
    views: Views,
    probe: bool,
    shared: Pass | None,
) -> TeacherWork:
    """Plan one teacher. ``parts``: its parts; ``shared``: the forward pass it needs."""
    wanted = plan.info if plan else parts[0][0]
    known = TeacherWork(
        name=teacher.name,
        task=teacher.task,
        kept=kind_of(wanted).summary,
        share=share_of(wanted.domains, survey.reference.domains, len(survey.reference)),
        units_to_make=sum(work.units for _, work in parts),
        units_present=sum(work.present for _, work in parts),
        replicas=len(wanted.view_class.numbers(config.cache.masked_replicas)),
        shares=() if shared is None else tuple(n for n in shared.names if n != teacher.name),
    )
    if plan and not teacher.vocabulary:
        cut, longest = foreseen_cut(plan, survey.steps)
        known = replace(known, cut=cut, longest=longest)
    if teacher.served is not None:
        asked, at_a_time = _requests(teacher.served, parts), teacher.served.max_concurrency
        known = replace(known, requests=asked, at_a_time=at_a_time)
    if not known.units_to_make:
        return replace(known, positions=0, bytes=0, seconds=0.0)
    measured, absent = None, None if plan else _absence(teacher)
    if plan and probe:
        alone = Pass((plan,), {})  # only tails are to be made
        try:
            measured = (shared or alone).probe(teacher.name, survey.steps)
        except ServerAwayError:  # the cache describes the teacher
            absent = _absence(teacher)
    tokens = sum(work.tokens for _, work in parts)
    rate = measured.seconds_per_token if measured else None
    if not tokens and survey.estimated:
        none = "the sample has no sequence of its domains"
        return replace(known, seconds_per_token=rate, reason=absent or none)
    density = positions_per_token(survey.steps, wanted)
    return replace(
        known,
        positions=round(tokens * density),
        bytes=_bytes(parts, wanted, density, measured),
        at_most=(measured is None or measured.bytes_per_position is None)
        and any(kind_of(info).size_varies for info, _ in parts),
        seconds_per_token=rate,
        seconds=None if rate is None else _seconds(teacher.name, parts, rate, shared),
        reason=absent or (None if measured else "its time was not probed"),
    )


def _requests(served: ServedConfig, parts: list[Part]) -> int:
    """Return the number of requests to a server: for all sequences, and the probes of each unit."""
    each = served.prompts_per_request
    missing = (shards for _, work in parts for shards in work.missing)
    return sum(one.count * (1 + math.ceil(one.rows * one.share / each)) for one in missing)


def _seconds(name: str, parts: list[Part], rate: float, shared: Pass | None) -> float:
    """Return the teacher's seconds at ``rate`` seconds a token, divided among the teachers of
    ``shared``.
    """
    if shared is None:
        return rate * sum(work.tokens for _, work in parts)
    tails = sum(work.tokens for info, work in parts if info.extends is not None)
    return shared.seconds(name, rate) + rate * len(shared.group) * tails


def _bytes(
    parts: list[Part], wanted: TeacherInfo, density: float, measured: Probe | None
) -> int | None:
    """Return the bytes to write; None if a column's width is unknown. ``density``: targets per
    token.
    """
    if not kind_of(wanted).has_sizes:
        return None
    total = 0
    for info, work in parts:
        if not work.missing:
            continue
        alike = (info.kind, info.k) == (wanted.kind, wanted.k)
        per_position = measured.bytes_per_position if measured and alike else None
        total += bytes_of(work.missing, info, density * work.tokens, per_position)
        if kind_of(info).has_head and not work.present:  # with the output matrix, in fp32
            total += 4 * (info.vocabulary_size or 0) * (info.hidden_size or 0)
    return total


def described(
    teacher: TeacherConfig, folder: Path, survey: CorpusSurvey, views: Views, seed: int
) -> TeacherPlan:
    """Describe a teacher from its files in ``folder``."""
    if not survey.estimated:
        check_domains(survey.reference, teacher.domains or (), f"teacher {teacher.name!r}: domains")
    return plan_teacher(teacher, survey.present or survey.reference, views, seed, folder)


def _absence(teacher: TeacherConfig) -> str:
    """Say why the teacher's files are not here."""
    if teacher.served is not None:
        return f"its server {teacher.served.url} does not answer"
    for name in missing(teacher.model):
        return f"its model {name} is not made yet"
    return f"its model {teacher.model} is not on this machine"


def at_hand(model: str, must_be: bool, check: Callable[[Path], None] | None = None) -> Path | None:
    """Return the directory of a model on this machine, or None.

    A model from the hub or a built-in one may be missing; any other only without ``must_be``, else
    raise InputError. ``check``: as of ``resolve_model``.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return resolve_model(model, check)
    if missing(model):
        return None
    if is_gguf(model) and not path.is_file() and not must_be:
        return None
    if not path.is_absolute() and HUB_ID.match(model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = Path(snapshot_download(model, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        return found if list(found.glob("*.safetensors")) else None
    return resolve_model(model, check) if must_be else None


def _assumed(teacher: TeacherConfig, survey: CorpusSurvey, views: Views) -> TeacherInfo:
    """Describe a teacher without its model. The vocabulary is the corpus's; the width of the output
    comes from the cache if the teacher is there.
    """
    width = 1 if teacher.task == "regression" else None
    if survey.present is not None and is_described(survey.present.store, teacher.name):
        known = read_teacher(survey.present.store, teacher.name)
        width = width or (known.hidden_size or known.dimensions or known.num_labels)
    facts = survey.reference.info["tokenizer"]
    tokens = facts["size"] - len(hole_ids(facts))
    return TeacherInfo.model_validate(configured(teacher, views, facts["size"], width, tokens))
