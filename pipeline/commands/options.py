"""Arguments and options of commands; first those that several commands take."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from rekindle.data.errors import InputError
from rekindle.data.places import address_of, expanded
from rekindle.data.storage.client import FILE_URL

# Arguments and options that are places, but no Path: hub ids, addresses and built-in names too.
PLACES = ("cache", "model", "train", "dev", "test", "text", "prompts")

WRITING_TO_STORES = ("train-student", "finetune", "export", "merge-adapter")  # with --out s3://…

# Commands whose --help lists the keys of --set; the keys of a run are in docs and recipes.
KEYS_LISTED = ("finetune", "evaluate", "predict", "generate")


class Command(TyperCommand):
    """Expands ``~`` and ``$VARIABLES`` in every place, and explains how to set a configuration key
    that is given as an option.

    A shell leaves both alone in ``--out=~/x`` and within single quotes, and a job may have no
    shell.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # of click, here and below,
        """Read the command line."""  # which typer carries with it or not
        typed = [*args]
        for previous, argument in zip(["", *typed], typed, strict=False):
            if argument == "" or (
                argument.startswith("--") and argument.count("=") == 1 and argument.endswith("=")
            ):
                option = (
                    argument or previous if previous.startswith("-") else argument or "an argument"
                )
                raise InputError(
                    f"{option.rstrip('=')} is given an empty value, as from a variable of the "
                    "shell that is not set; give a value, or leave it out"
                )
        try:
            remaining: list[str] = super().parse_args(ctx, args)
        except Exception as error:
            if type(error).__name__ == "NoSuchOption":
                self._refuse_key(str(getattr(error, "option_name", "")), typed)
            raise
        return remaining

    def _refuse_key(self, option: str, typed: list[str]) -> None:
        """Raise InputError if ``option`` is a key of --set, and not the beginning of an option."""
        option_names = [name for parameter in self.params for name in parameter.opts]
        if "--set" in option_names and not any(name.startswith(option) for name in option_names):
            from rekindle.pipeline.commands.keys import refuse_option

            refuse_option(str(self.name), option, typed)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, followed by the keys of --set."""
        super().format_help(ctx, formatter)
        if self.name in KEYS_LISTED:
            from rekindle.pipeline.commands.keys import print_keys

            print_keys(str(self.name))

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        for name, value in ctx.params.items():
            if name == "out" and value == Path("-"):
                raise InputError(
                    "--out -: only the rows of `pipeline predict` go to stdout; give a name"
                )
            address = address_of(Path(value)) if name == "out" and value else None
            if address is not None and self.name not in WRITING_TO_STORES:
                raise InputError(
                    f"--out {address}: {self.name} writes to this machine only; give a local "
                    "--out, and copy it there afterwards. To a store write: "
                    f"{', '.join(WRITING_TO_STORES)}"
                )
            if isinstance(value, Path) or (name in PLACES and isinstance(value, str)):
                ctx.params[name] = type(value)(expanded(_without_scheme(value)))
            elif isinstance(value, list | tuple) and all(isinstance(item, Path) for item in value):
                ctx.params[name] = [Path(expanded(_without_scheme(item))) for item in value]
        return super().invoke(ctx)


def _without_scheme(place: str | Path) -> str:
    """Return a local place that is written as an address as its path. A Path has one slash
    for two.
    """
    scheme = "file:" if isinstance(place, Path) else FILE_URL
    path = str(place).removeprefix(scheme)
    return path if path.startswith("/") else str(place)


RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run configuration")]
CachePath = Annotated[
    str, typer.Argument(metavar="CACHE", help="a cache: local path, s3://…, hf://datasets/…")
]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable results")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override one value of the configuration"),
]
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY.PATH=V1,V2",
        help="one student for each value, in folders of --out; repeated: one for each combination",
    ),
]
Students = Annotated[
    int | None,
    typer.Option(
        min=1, help="students of a sweep to train at a time; default: one per CUDA device, or one"
    ),
]

ModelPlace = Annotated[
    str, typer.Argument(metavar="MODEL", help="a model directory, hub id, s3://… or hf://…")
]
Metric = Annotated[
    str | None, typer.Option(help="the main score: accuracy, f1, matthews, pearson, …")
]
HeadName = Annotated[str | None, typer.Option("--head", help="which head of a student")]
TextField = Annotated[
    list[str] | None,
    typer.Option(metavar="COLUMN", help="the column of the text; given twice: the two of pairs"),
]
LabelField = Annotated[
    str | None, typer.Option(metavar="COLUMN", help="the column of the labels; default: label")
]
Force = Annotated[bool, typer.Option("--force", help="replace --out, if it is there")]
