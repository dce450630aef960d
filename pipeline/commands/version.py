"""``pipeline --version``."""

from typing import Annotated

import typer


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from rekindle.train.record.versions import package_versions

        for name, version in package_versions().items():
            typer.echo(f"{name} {version}")
        raise typer.Exit


def take_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="print the versions of Rekindle and of the packages that its results depend on",
        ),
    ] = False,
) -> None:
    """Take what may stand before a command."""
