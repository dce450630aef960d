"""The JSON Schema of a configuration file, for editors: ``pipeline schema``."""

from rekindle.data.settings_schema import Schema, schema_of

KINDS = ("run", "cycle")


def file_schema(kind: str) -> Schema:
    """Return the JSON Schema of a run file or of a cycle file (``pipeline rekindle``)."""
    if kind == "cycle":
        from rekindle.pipeline.cycle.config import CycleConfig

        return schema_of(CycleConfig, "Rekindle: a whole cycle")
    from rekindle.pipeline.config import RunConfig

    return schema_of(RunConfig, "Rekindle: a run of both stages")
