"""The files to change, and the commands that read them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """``files``: globs below the world. ``share``: number of cases out of 2,000."""

    files: tuple[str, ...]
    format: str
    commands: tuple[str, ...]
    share: int


MODEL = ("config.json",)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
CACHE = (
    "cache/cache.json",
    "cache/corpus/*.json",
    "cache/corpus/commits/*.json",
    "cache/views/*/*.json",
    "cache/views/*/commits/*.json",
    "cache/targets/*/teacher.json",
    "cache/targets/*/commits/*.json",
)
READ_CACHE = ("train", "cache", "verify", "inspect", "example", "audit", "plan")
RUN = ("run.json", "summary.json", "rekindle_student.json")


def inside(folder: str, files: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/{name}" for name in files)


SUBJECTS = {
    "run file": Subject(("run.yaml",), "settings", ("train", "plan", "cache"), 160),
    "cycle file": Subject(("cycle.yaml",), "settings", ("cycle",), 60),
    "sweep": Subject(("swept/sweep.json",), "whole", ("sweep", "compare sweep"), 40),
    "labels": Subject(("labels.jsonl",), "line", ("finetune", "evaluate"), 140),
    "text": Subject(("docs.jsonl",), "line", ("cache text", "perplexity", "predict"), 80),
    "chat": Subject(("chat.jsonl",), "line", ("cache chat", "generate"), 100),
    "tokens": Subject(("tokens.jsonl",), "line", ("cache tokens",), 80),
    "expert's config": Subject(("expert/config.json",), "whole", ("predict", "cache text"), 120),
    "teacher's config": Subject(("lm/config.json",), "whole", ("cache text", "perplexity"), 80),
    "student's config": Subject(("student/config.json",), "whole", ("train", "finetune"), 100),
    "tokenizer": Subject(
        inside("expert", TOKENIZER) + inside("student", TOKENIZER),
        "whole",
        ("predict", "cache text", "finetune"),
        200,
    ),
    "generation": Subject(("causal/generation_config.json",), "whole", ("generate",), 50),
    "safetensors": Subject(
        ("expert/*.safetensors", "lm/*.safetensors", "student/*.safetensors"),
        "header",
        ("predict", "cache text", "train"),
        100,
    ),
    "checkpoint": Subject(("half/checkpoints/*/*.json",), "whole", ("resume",), 100),
    "signed checkpoint": Subject(("half/checkpoints/*/trainer.json",), "signed", ("resume",), 80),
    "run begun": Subject(("half/run.json",), "whole", ("resume", "compare"), 80),
    "metrics": Subject(("half/metrics.jsonl",), "line", ("resume", "compare"), 50),
    "expert done": Subject(("taught/metrics.json",), "whole", ("ask taught",), 60),
    "run done": Subject(
        inside("whole", (*RUN, *MODEL)),
        "whole",
        ("of student", "tune student", "export", "compare", "cache student"),
        100,
    ),
    "cache": Subject(CACHE, "whole", READ_CACHE, 70),
    "signed cache": Subject(CACHE, "signed", READ_CACHE, 150),
}
assert sum(one.share for one in SUBJECTS.values()) == 2000
