"""The command that sends things to a hub."""

from typing import Annotated

import typer

from rekindle.pipeline.commands.options import Json
from rekindle.pipeline.console import say
from rekindle.pipeline.exits import resumable


def push(
    cache: Annotated[
        str, typer.Argument(metavar="DIR", help="a cache, or the folder of a student or expert")
    ],
    repo: Annotated[
        str,
        typer.Argument(metavar="REPO", help="OWNER/NAME on the hub; made if it is not there"),
    ],
    with_text: Annotated[
        bool, typer.Option("--with-text", help="send a cache's text, too; else it stays here")
    ] = False,
    with_readable_targets: Annotated[
        bool,
        typer.Option(
            "--with-readable-targets",
            help="without the text, send also what tells it: the targets of language models",
        ),
    ] = False,
    teacher: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="only this teacher; may be repeated")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="make a new repository a private one")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="a branch; made where it is not there")
    ] = None,
    message: Annotated[str | None, typer.Option(help="of the commit")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="list what would be sent, with sizes; ask no hub")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a cache, a student or an expert, with its card, to a hub. Resumes by itself.

    Log in with `hf auth login`, or set HF_TOKEN. docs/sharing.md says what is sent.
    """
    with resumable() as progress:
        from rekindle.pipeline.sharing.contents import Asked, check_repo
        from rekindle.pipeline.sharing.push import push as send

        request = Asked(
            cache,
            check_repo(repo),
            revision,
            with_text,
            with_readable_targets,
            tuple(teacher or ()),
        )
        sent = send(request, private=private, message=message, dry_run=dry_run, progress=progress)
    for line in sent.told:
        say(f"{cache}: {line}")
    typer.echo(sent.as_json() if as_json else sent.as_text())
