"""Arguments and options of commands, those first that several take."""

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
Sweeps = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY.PATH=V1,V2",
        help="a student for each value, in folders of --out; repeated: for each combination",
    ),
]
Students = Annotated[
    int | None,
    typer.Option(min=1, help="students of a sweep at a time; default: one per CUDA device, or one"),
]
