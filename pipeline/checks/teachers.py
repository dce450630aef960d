"""The teachers of a cache, as ``pipeline teachers`` lists them."""

import json
from collections.abc import Sequence

from rekindle.data.cache import Cache
from rekindle.data.changes.listed import TeacherSummary, describe_change, teachers_of
from rekindle.data.counted import counted, shown_bytes
from rekindle.data.storage.seal import VERSION
from rekindle.pipeline.checks.origin import origin_lines
from rekindle.pipeline.console import in_line
from rekindle.pipeline.report.table import NOTHING, Table, table_of
from rekindle.pipeline.report.text import terminal_width, text_lines


def list_teachers(path: str, as_json: bool = False) -> str:
    """Return the teachers of the cache at ``path``, as text or JSON. Raise CacheError as Cache
    does.
    """
    cache = Cache.open(path)
    listed, waiting = teachers_of(cache), describe_change(cache)
    version = cache.manifest[VERSION]
    if as_json:
        about = {"cache": path, "format_version": version, "under_way": waiting or None}
        return json.dumps(about | {"teachers": [vars(one) for one in listed]}) + "\n"
    total = shown_bytes(sum(one.bytes for one in listed))
    lines = [f"{path}: {counted(len(cache.teachers), 'teacher')}, {total} (cache format {version})"]
    lines += [f"under way: {waiting}"] if waiting else []
    if listed:
        lines += ["", *text_lines(_table(listed), terminal_width()), ""]
    for teacher in cache.teachers.values():
        if not (teacher.info.imported or teacher.info.served):
            told = f"was run: {teacher.info.model}, weights {teacher.fingerprint[:12]}"
            lines.append(in_line(f"{teacher.info.name} {told}"))
        lines += origin_lines(teacher)
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(listed: Sequence[TeacherSummary]) -> Table:
    head = ("teacher", "task", "kept", "codec", "temperatures", "saw", "domains", "precision")
    numbers = ("units", "bytes", "format")
    rows = [
        [
            f"{one.name} {one.part}".strip(),
            one.task,
            one.kept,
            one.codec,
            ", ".join(f"{at:g}" for at in one.temperatures) or NOTHING,
            one.view,
            "all" if one.domains is None else in_line(", ".join(one.domains)),
            one.precision,
            f"{one.units:,} of {one.units_planned:,}",
            shown_bytes(one.bytes),
            str(one.format_version),
        ]
        for one in listed
    ]
    note = (
        "units: files; a finished teacher has one for each corpus shard and masking; format: the "
        "lowest cache format with such a teacher"
    )
    return table_of("", head + numbers, rows, words=len(head), note=note)
