"""The plan of one teacher: from its files if they are here, else from what is known.

Only the probe loads a model; nothing is downloaded.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from rekindle.data.corpus.config import gap_ids
from rekindle.data.corpus.tokenizer_files import is_gguf
from rekindle.data.hub.names import may_be_hub_id
from rekindle.data.targets.kinds.registry import kind_of
from rekindle.data.targets.reading.files import is_described, read_teacher
from rekindle.data.targets.schema import TeacherInfo
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.extensions import plan_parts
from rekindle.pipeline.caching.teachers import TeacherPlan, configured_fields, plan_teacher
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
from rekindle.train.model.folder import resolve_model
from rekindle.train.order.domains import check_domains


def plan_local_teachers(
    config: RunConfig, survey: CorpusSurvey, views: Views, is_required: bool
) -> list[TeacherPlan | None]:
    """Describe every teacher whose model ``local_model`` finds, before any of them is probed.

    ``views`` belong to ``survey.probe_corpus``. Raise InputError and CacheMismatchError as
    ``plan_run``.
    """
    folders = [
        Path() if teacher.served else local_model(teacher.model, is_required, check_of(teacher))
        for teacher in config.teachers
    ]
    plans: list[TeacherPlan | None] = []
    for teacher, folder in zip(config.teachers, folders, strict=True):
        plans.append(None)
        with suppress(ServerAwayError):
            if folder is not None:
                plans[-1] = describe_local(teacher, folder, survey, views, config.cache.seed)
    return plans


def plan_all_teachers(
    config: RunConfig,
    plans: Sequence[TeacherPlan | None],
    survey: CorpusSurvey,
    views: Views,
    probe: bool,
) -> tuple[TeacherWork, ...]:
    """Return what `pipeline cache-teachers` would do for each teacher; ``views`` belong to
    ``survey.probe_corpus``.
    """
    plans_and_parts = []
    for teacher, plan in zip(config.teachers, plans, strict=True):
        infos = [plan.info if plan else _describe_without_model(teacher, survey, views)]
        if plan and survey.cached is not None:
            infos = [part.info for part in plan_parts(survey.cached, plan)]
        parts = [(i, work_of(survey, config.cache, i.folder, i.view, i.domains)) for i in infos]
        plans_and_parts.append((plan, parts))
    shared = shared_passes(plans_and_parts)
    return tuple(
        _plan_one(teacher, plan, parts, config, survey, views, probe, shared.get(teacher.name))
        for teacher, (plan, parts) in zip(config.teachers, plans_and_parts, strict=True)
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
    info = plan.info if plan else parts[0][0]
    known_work = TeacherWork(
        name=teacher.name,
        task=teacher.task,
        kept=kind_of(info).summary,
        share=share_of(info.domains, survey.reference.domains, len(survey.reference)),
        units_to_make=sum(work.units for _, work in parts),
        units_present=sum(work.present for _, work in parts),
        replicas=len(info.view_class.numbers(config.cache.masked_replicas)),
        shares=() if shared is None else tuple(n for n in shared.names if n != teacher.name),
    )
    if plan and not teacher.vocabulary:
        cut, longest = foreseen_cut(plan, survey.probe_corpus)
        known_work = replace(known_work, cut=cut, longest=longest)
    if teacher.served is not None:
        request_count, at_a_time = _requests(teacher.served, parts), teacher.served.max_concurrency
        known_work = replace(known_work, requests=request_count, at_a_time=at_a_time)
    if not known_work.units_to_make:
        return replace(known_work, positions=0, bytes=0, seconds=0.0)
    measured, absence = None, None if plan else _absence(teacher)
    if plan and probe:
        own_pass = Pass((plan,), {})  # only tails are to be made
        try:
            measured = (shared or own_pass).probe(teacher.name, survey.probe_corpus)
        except ServerAwayError:  # the cache describes the teacher
            absence = _absence(teacher)
    tokens = sum(work.tokens for _, work in parts)
    rate = measured.seconds_per_token if measured else None
    if not tokens and survey.estimated:
        reason = "the sample has no sequence of its domains"
        return replace(known_work, seconds_per_token=rate, reason=absence or reason)
    density = positions_per_token(survey.probe_corpus, info)
    return replace(
        known_work,
        positions=round(tokens * density),
        bytes=_bytes(parts, info, density, measured),
        at_most=(measured is None or measured.bytes_per_position is None)
        and any(kind_of(part).size_varies for part, _ in parts),
        seconds_per_token=rate,
        seconds=None if rate is None else _seconds(teacher.name, parts, rate, shared),
        reason=absence or (None if measured else "its time was not probed"),
    )


def _requests(served: ServedConfig, parts: list[Part]) -> int:
    """Return the number of requests to a server: for all sequences, and the probes of each unit."""
    per_request = served.prompts_per_request
    missing = (shards for _, work in parts for shards in work.missing)
    return sum(
        shards.count * (1 + math.ceil(shards.rows * shards.share / per_request))
        for shards in missing
    )


def _seconds(name: str, parts: list[Part], rate: float, shared: Pass | None) -> float:
    """Return the teacher's seconds at ``rate`` seconds a token, divided among the teachers of
    ``shared``.
    """
    if shared is None:
        return rate * sum(work.tokens for _, work in parts)
    tails = sum(work.tokens for info, work in parts if info.extends is not None)
    return shared.seconds(name, rate) + rate * len(shared.group) * tails


def _bytes(
    parts: list[Part], main: TeacherInfo, density: float, measured: Probe | None
) -> int | None:
    """Return the bytes to write; None if a column's width is unknown. ``density``: targets per
    token.
    """
    if not kind_of(main).has_sizes:
        return None
    total = 0
    for info, work in parts:
        if not work.missing:
            continue
        is_same_kind = (info.kind, info.k) == (main.kind, main.k)
        per_position = measured.bytes_per_position if measured and is_same_kind else None
        total += bytes_of(work.missing, info, density * work.tokens, per_position)
        if kind_of(info).has_head and not work.present:  # with the output matrix, in fp32
            total += 4 * (info.vocabulary_size or 0) * (info.hidden_size or 0)
    return total


def describe_local(
    teacher: TeacherConfig, folder: Path, survey: CorpusSurvey, views: Views, seed: int
) -> TeacherPlan:
    """Describe a teacher from its files in ``folder``."""
    if not survey.estimated:
        check_domains(survey.reference, teacher.domains or (), f"teacher {teacher.name!r}: domains")
    return plan_teacher(teacher, survey.cached or survey.reference, views, seed, folder)


def _absence(teacher: TeacherConfig) -> str:
    """Say why the teacher's files are not here."""
    if teacher.served is not None:
        return f"its server {teacher.served.url} does not answer"
    for name in missing(teacher.model):
        return f"its model {name} is not made yet"
    return f"its model {teacher.model} is not on this machine"


def local_model(
    model: str, is_required: bool, check: Callable[[Path], None] | None = None
) -> Path | None:
    """Return the directory of a model on this machine, or None.

    A model from the hub or a built-in one may be missing; any other only without ``is_required``,
    else raise InputError. ``check``: as of ``resolve_model``.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return resolve_model(model, check)
    if missing(model):
        return None
    if is_gguf(model) and not path.is_file() and not is_required:
        return None
    if may_be_hub_id(model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot = Path(snapshot_download(model, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        return snapshot if list(snapshot.glob("*.safetensors")) else None
    return resolve_model(model, check) if is_required else None


def _describe_without_model(
    teacher: TeacherConfig, survey: CorpusSurvey, views: Views
) -> TeacherInfo:
    """Describe a teacher without its model. The vocabulary is the corpus's; the width of the output
    comes from the cache if the teacher is there.
    """
    width = 1 if teacher.task == "regression" else None
    if survey.cached is not None and is_described(survey.cached.store, teacher.name):
        cached = read_teacher(survey.cached.store, teacher.name)
        width = width or (cached.hidden_size or cached.dimensions or cached.num_labels)
    facts = survey.reference.info["tokenizer"]
    tokens = facts["size"] - len(gap_ids(facts))
    return TeacherInfo.model_validate(
        configured_fields(teacher, views, facts["size"], width, tokens)
    )
