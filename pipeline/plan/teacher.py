"""The plan of one teacher: described from its files where they are here, else from what is known.

No model is loaded but by the probe, and none is downloaded.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rekindle.data.targets.kinds.registry import VOCABULARY_KINDS, kind_of
from rekindle.data.targets.reading.files import read_teacher
from rekindle.data.targets.schema import TeacherInfo
from rekindle.data.views.plain import Clean, Text
from rekindle.pipeline.builtin.missing import missing
from rekindle.pipeline.caching.cache_teachers import Views
from rekindle.pipeline.caching.extensions import plan_parts
from rekindle.pipeline.caching.teachers import TeacherPlan, is_described, plan_teacher
from rekindle.pipeline.config import RunConfig
from rekindle.pipeline.plan.probe import Probe, probe_teacher
from rekindle.pipeline.plan.sample import CorpusSurvey
from rekindle.pipeline.plan.work import (
    Shards,
    bytes_of,
    domain_share,
    positions_in,
    work_of_part,
)
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.model.files import HUB_ID, resolve_model
from rekindle.train.order.domains import check_domains


@dataclass(frozen=True)
class TeacherWork:
    """What is left to do for one teacher. None: not known, and ``reason`` says why."""

    name: str
    task: str
    kept: str = "?"
    share: float | None = None  # of the sequences: those of its domains
    units_to_make: int | None = None
    units_present: int | None = None
    positions: int | None = None
    bytes: int | None = None
    seconds_per_token: float | None = None  # of the corpus, in one replica, as probed
    seconds: float | None = None
    reason: str | None = None
    replicas: int = 1  # how often it sees each sequence


@dataclass(frozen=True)
class _Part:
    """A part of a teacher's targets: one folder of the cache."""

    info: TeacherInfo
    work: list[Shards]
    units_present: int


def plan_one_teacher(
    teacher: TeacherConfig, config: RunConfig, survey: CorpusSurvey, views: Views, probe: bool
) -> TeacherWork:
    """What `pipeline cache-teachers` would do for ``teacher``. ``views`` are of ``survey.steps``.

    Raises InputError and CacheMismatchError as ``plan_run`` does.
    """
    plan, absent = _described(teacher, config, survey, views, probe)
    wanted = plan.info if plan else _assumed(teacher, survey, views)
    infos = [wanted]
    if plan and survey.present is not None:
        infos = [part.info for part in plan_parts(survey.present, plan)]
    replicas, per_shard = config.cache.masked_replicas, config.cache.sequences_per_shard
    parts = [_Part(i, *work_of_part(survey, i, replicas, per_shard)) for i in infos]
    work = [shards for part in parts for shards in part.work]
    measured = probe_teacher(plan, survey.steps) if work and plan and probe else None
    positions, size, seconds, reason = _amounts(parts, wanted, survey, measured)
    if work and seconds is None:
        reason = absent or reason or "its time was not probed"
    return TeacherWork(
        name=teacher.name,
        task=teacher.task,
        kept=kind_of(wanted).kept,
        share=domain_share(survey.reference, wanted.domains),
        units_to_make=sum(shards.count for shards in work),
        units_present=sum(part.units_present for part in parts),
        positions=positions,
        bytes=size,
        seconds_per_token=measured.seconds_per_token if measured else None,
        seconds=seconds,
        reason=reason,
        replicas=len(wanted.shown.numbers(replicas)),
    )


def _amounts(
    parts: list[_Part], wanted: TeacherInfo, survey: CorpusSurvey, measured: Probe | None
) -> tuple[int | None, int | None, float | None, str | None]:
    """Positions, bytes, seconds, and why something of it is not known."""
    work = [shards for part in parts for shards in part.work]
    if not work:
        return 0, 0, 0.0, None
    tokens = sum(shards.count * shards.share * shards.tokens for shards in work)
    if not tokens and survey.estimated:
        return None, None, None, "the sample has no sequence of its domains"
    positions = positions_in(work, survey.steps, wanted)
    sizes = [_bytes(part, wanted, survey, measured) for part in parts if part.work]
    size = None if None in sizes else sum(known for known in sizes if known is not None)
    seconds = measured.seconds_per_token * tokens if measured else None
    return round(positions), size, seconds, None


def _bytes(
    part: _Part, wanted: TeacherInfo, survey: CorpusSurvey, measured: Probe | None
) -> int | None:
    """Bytes that are to be written of a part; None without a width of its columns."""
    info = part.info
    kind = kind_of(info)
    if not kind.sized:
        return None
    alike = (info.kind, info.k) == (wanted.kind, wanted.k)
    per_position = measured.bytes_per_position if measured and alike else None
    positions = positions_in(part.work, survey.steps, info)
    size = bytes_of(part.work, info, positions, per_position)
    if kind.has_head and not part.units_present:  # with the output matrix, in fp32
        size += 4 * (info.vocabulary_size or 0) * (info.hidden_size or 0)
    return size


def _described(
    teacher: TeacherConfig, config: RunConfig, survey: CorpusSurvey, views: Views, probe: bool
) -> tuple[TeacherPlan | None, str | None]:
    """The teacher from its files; or None, and why there are none."""
    folder = at_hand(teacher.model, must_be=probe)
    if folder is None:
        for name in missing(teacher.model):
            return None, f"its model {name} is not made yet"
        return None, f"its model {teacher.model} is not on this machine"
    if not survey.estimated:
        check_domains(survey.reference, teacher.domains or (), f"teacher {teacher.name!r}: domains")
    # While the corpus is only estimated, its domains are not known.
    here = teacher.model_copy(update={"model": str(folder), "domains": None})
    pairs = views.pairs.get(teacher.pairs or "")
    corpus = survey.present or survey.reference
    plan = plan_teacher(here, corpus, views.masked, pairs, config.cache.seed)
    domains = teacher.domains and tuple(sorted(set(teacher.domains)))
    info = plan.info.model_copy(update={"domains": domains, "model": teacher.model})
    return TeacherPlan(teacher, plan.directory, info), None


def at_hand(model: str, must_be: bool) -> Path | None:
    """Return the directory of a model that is on this machine. One of the hub or a built-in one
    may be missing; another only unless it ``must_be`` there, else InputError.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return resolve_model(model)
    if missing(model):
        return None
    if not path.is_absolute() and HUB_ID.match(model):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            found = Path(snapshot_download(model, local_files_only=True))
        except LocalEntryNotFoundError:
            return None
        return found if list(found.glob("*.safetensors")) else None
    return resolve_model(model) if must_be else None


def _assumed(teacher: TeacherConfig, survey: CorpusSurvey, views: Views) -> TeacherInfo:
    """What can be said of a teacher without its model: a vocabulary is the corpus's, the width of
    its output as in the cache, if it is there.
    """
    about: dict[str, Any] = {"name": teacher.name, "task": teacher.task}
    about |= {"domains": teacher.domains and tuple(sorted(set(teacher.domains)))}
    known = _in_cache(teacher, survey)
    if not teacher.vocabulary:
        pairs = views.pairs.get(teacher.pairs or "") if teacher.pair_expert else None
        labels = 1 if teacher.task == "regression" else known and known.num_labels
        about |= {"kind": "token" if teacher.task == "token_classification" else "sequence"}
        about |= {"view": pairs.name if pairs else Text.kind, "num_labels": labels}
        return TeacherInfo(**about, monte_carlo_passes=teacher.monte_carlo.passes)
    targets = teacher.targets
    size = survey.reference.info["tokenizer"]["size"]
    masked = views.masked if teacher.sees_masks else None
    about |= {"view": masked.name if masked else Clean.kind, "vocabulary_size": size}
    about |= VOCABULARY_KINDS[targets.vocabulary_kind].settings(
        targets.k, targets.temperatures, targets.codec, size, known.hidden_size if known else None
    )
    return TeacherInfo(**about)


def _in_cache(teacher: TeacherConfig, survey: CorpusSurvey) -> TeacherInfo | None:
    if survey.present is None or not is_described(survey.present, teacher.name):
        return None
    return read_teacher(survey.present.store, teacher.name)
