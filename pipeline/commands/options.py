"""Arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="the run configuration")]
CachePath = Annotated[
    str, typer.Argument(metavar="CACHE", help="a cache: local path, s3://…, gs://…")
]
Json = Annotated[bool, typer.Option("--json", help="print machine-readable results")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="override one value of the configuration"),
]
