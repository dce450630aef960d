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
    entries, unfinished = teachers_of(cache), describe_change(cache)
    version = cache.manifest[VERSION]
    if as_json:
        header = {"cache": path, "format_version": version, "under_way": unfinished or None}
        return json.dumps(header | {"teachers": [vars(entry) for entry in entries]}) + "\n"
    total = shown_bytes(sum(entry.bytes for entry in entries))
    lines = [f"{path}: {counted(len(cache.teachers), 'teacher')}, {total} (cache format {version})"]
    lines += [f"under way: {unfinished}"] if unfinished else []
    if entries:
        lines += ["", *text_lines(_table(entries), terminal_width()), ""]
    for teacher in cache.teachers.values():
        if not (teacher.info.imported or teacher.info.served):
            origin = f"was run: {teacher.info.model}, weights {teacher.fingerprint[:12]}"
            lines.append(in_line(f"{teacher.info.name} {origin}"))
        lines += origin_lines(teacher)
    return "\n".join(lines).rstrip("\n") + "\n"


def _table(entries: Sequence[TeacherSummary]) -> Table:
    head = ("teacher", "task", "kept", "codec", "temperatures", "saw", "domains", "precision")
    numbers = ("units", "bytes", "format")
    rows = [
        [
            f"{entry.name} {entry.part}".strip(),
            entry.task,
            entry.kept,
            entry.codec,
            ", ".join(f"{temperature:g}" for temperature in entry.temperatures) or NOTHING,
            entry.view,
            "all" if entry.domains is None else in_line(", ".join(entry.domains)),
            entry.precision,
            f"{entry.units:,} of {entry.units_planned:,}",
            shown_bytes(entry.bytes),
            str(entry.format_version),
        ]
        for entry in entries
    ]
    note = (
        "units: files; a finished teacher has one for each corpus shard and masking; format: the "
        "lowest cache format with such a teacher"
    )
    return table_of("", head + numbers, rows, words=len(head), note=note)
