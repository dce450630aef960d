"""The command that lists the teachers of a cache, and changes one of them."""

import json
from typing import TYPE_CHECKING, Annotated

import typer

from rekindle.data.counted import counted, shown_bytes
from rekindle.data.errors import InputError
from rekindle.pipeline.commands.options import CachePath, Json
from rekindle.pipeline.exits import resumable

if TYPE_CHECKING:
    from rekindle.data.journal import Action, Change


def teachers(
    cache: CachePath,
    remove: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="remove a teacher and free its bytes; needs --yes"),
    ] = None,
    rename: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="OLD NEW", help="rename a teacher: its files are copied"),
    ] = None,
    transcode: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="NAME CODEC",
            help="keep a teacher's targets in the codec compact (less to store, slower to read) or "
            "default; no value changes",
        ),
    ] = None,
    yes: Annotated[
        bool,
        typer.Option(
            "--yes", help="with --remove: do it; without --yes, only say what would be removed"
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """List the teachers of a cache; remove, rename or transcode one of them. Resumes by itself.

    Readers of the cache see it as before the change, or as after it. See docs/teachers.md.
    """
    changes: dict[Action, tuple[str, ...]] = {}
    changes |= {"remove": (remove,)} if remove is not None else {}
    changes |= {"rename": rename} if rename is not None else {}
    changes |= {"transcode": transcode} if transcode is not None else {}
    if len(changes) > 1:
        raise InputError(f"--{' and --'.join(changes)}: give one of them; the other afterwards")
    if yes and remove is None:
        raise InputError("--yes is for --remove: nothing else removes anything")
    for action, names in changes.items():
        facts = _change(cache, action, *names, yes=yes)
        typer.echo(json.dumps(facts) if as_json else f"{cache}: {facts['told']}")
        return
    from rekindle.pipeline.checks.teachers import list_teachers

    typer.echo(list_teachers(cache, as_json), nl=False)


def _change(
    cache: str, action: "Action", teacher: str, to: str | None = None, *, yes: bool = False
) -> dict[str, object]:
    from rekindle.data.changes.carry_out import change_teacher, size_of
    from rekindle.data.storage.store import open_store

    store = open_store(cache)
    size, units = 0, 0

    with resumable() as progress, progress.task(f"{action} {teacher}", unit="units") as bar:

        def begin(change: "Change") -> None:
            nonlocal size, units
            size, units = size_of(store, teacher)
            if action == "remove" and not yes:
                raise InputError(
                    f"--remove {teacher} takes {counted(units, 'unit')}, {shown_bytes(size)}, out "
                    f"of {cache} for good; nothing was removed yet. Add --yes to do it"
                )
            bar.begin(0)

        is_changed = change_teacher(
            store, action, teacher, to, begin, lambda commit: bar.advance(1)
        )
    facts: dict[str, object] = {
        "action": action,
        "teacher": teacher,
        "to": to,
        "changed": is_changed,
    }
    return facts | {"told": _describe_change(action, teacher, to, is_changed, size)}


def _describe_change(action: str, teacher: str, to: str | None, is_changed: bool, size: int) -> str:
    if not is_changed:
        reasons = {"remove": "was removed before", "rename": f"was renamed to {to} before"}
        reason = reasons.get(action, f"has the {to} codec already")
        return f"teacher {teacher} {reason}; nothing was done"
    if action == "remove":
        freed_note = f" ({shown_bytes(size)})" if size else ""
        return f"teacher {teacher} removed{freed_note}"
    if action == "rename":
        return f"teacher {teacher} is now {to}; use that name in run files"
    return (
        f"teacher {teacher} now has the {to} codec, with the same integers: transcoding adds no "
        f"error. Set its targets.codec to {to} in run files"
    )
