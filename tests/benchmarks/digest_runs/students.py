"""The students whose digests ``digests.py`` records, and all commands of some of the runs."""

from collections.abc import Mapping, Sequence

from digest_runs.caches import Step, cache_steps, caches
from digest_runs.material import Values


def term(*teachers: str, **more: object) -> Values:
    """Return one entry of ``train.objective.distill``."""
    return {"teachers": list(teachers)} | more


FALLING = {"schedule": "linear", "from": 1.0, "to": 0.0, "over": 0.6}
# What teaches the masked-LM students of the cache "masked".
OBJECTIVES: dict[str, Values] = {
    "sparse": {
        "distill": [
            term("topk", temperature=2.0, weight=FALLING),
            term("topk-precise", divergence="reverse_kl", k=5, weight=0.5),
            term("topk-compact", divergence="jsd", tail="renormalise", positions="masked"),
            term("padded", divergence="tvd", tail="none"),
            term("threshold", "threshold-precise", "threshold-compact", "random"),
            term("threshold-warm", temperature=2.0, weight=0.3),
        ],
    },
    "whole": {
        "distill": [
            term("dense", temperature=1.5),
            term("hidden", divergence="reverse_kl"),
            term("clean-topk", entropy_fraction=0.5, positions="masked"),
            term("clean-hidden", divergence="jsd", weight=0.2),
        ],
    },
    "committee": {
        "hard": {"weight": 0.5},
        "distill": [
            term("topk", "padded", combine="mixture", temperature=4.0),
            term("north", "south", combine="route", weight=0.5),
        ],
    },
    "experts": {
        "distill": [
            term("sense", "score", "tags", "several", view="clean"),
            term("sense-foreign", view="masked", divergence="mse", weight=0.5),
            term("adjacent"),
            term("same-document", divergence="mse"),
            term("score-pairs", ranking={"pairwise": 0.5}),
            term("sense-north", divergence="pseudo_label", confidence=0.2),
        ],
    },
    "muki": {
        "hard": {"weight": 0.0},
        "distill": [term("muki-1", "muki-2", combine="uncertainty")],
    },
    "muki-hard": {
        "distill": [
            term("muki-1", "muki-2", combine="uncertainty", uncertainty={"selection": "hard"}),
        ],
    },
    "union": {"distill": [term("sense", "sense-foreign", combine="concatenate", labels="apart")]},
    "replaced": {
        "hard": {"weight": 1.0},
        "methods": [{"method": "replaced_tokens", "weight": 20.0, "teacher": "topk"}],
    },
}


def trained(
    base: Values, student: Values, objective: Values | None = None, **train: object
) -> Values:
    """Return a run file with a student trained for a few steps."""
    settings: Values = {
        "steps": 8,
        "batch_sequences": 6,
        "micro_batch_sequences": 3,
        "learning_rate": 3.0e-3,
        "warmup_steps": 2,
        "checkpoint_every": 4,
        "evaluate_every": 4,
        "evaluate_sequences": 8,
        "held_out": 0.15,
        "objective": objective or {},
    }
    return base | {"student": student, "train": settings | train}


def students() -> dict[str, Values]:
    """Return run files by name; each trains the student, or the stages, of its name."""
    made = caches()
    masked, gpt = {"model": "models/student"}, {"model": "models/student-gpt", "task": "causal_lm"}
    found = {
        name: trained(made["masked"], masked, objective) for name, objective in OBJECTIVES.items()
    }
    found["replaced"]["student"] = masked | {"task": "replaced_token_detection"}
    long = {"steps": 40, "checkpoint_every": 3, "prefetch_threads": 2}
    found["resumed"] = trained(made["masked"], masked, OBJECTIVES["sparse"], **long)
    found["two"] = trained(made["masked"], masked, OBJECTIVES["experts"])
    causal = [
        term("topk", temperature=2.0, weight=FALLING),
        term("threshold", "threshold-compact", "random"),
        term("dense", "hidden", weight=0.5),
        term("sense"),
    ]
    found["causal"] = trained(
        made["causal"],
        gpt | {"from_scratch": True},
        {"distill": causal},
        curriculum={"teacher": "topk", "until": 0.4},
        schedule="cosine",
    )
    found["self-evolution"] = trained(
        made["hard"], masked, {"hard": {"weight": 0.9}, "distill": [term("reference", weight=0.1)]}
    )
    found["elle"] = elle(made["masked"])
    found["prompted"] = prompted(made["masked"])
    return found


def elle(base: Values) -> Values:
    """Return a run on two domains, one after the other; the student grows between them."""
    grown = {"layers": 3, "hidden_size": 48, "heads": 3, "noise_std": 0.01}
    replay = {"domains": ["north"], "fraction": 0.3}
    first = {"student.model": "{north}", "student.grow": grown, "train.domains": ["north"]}
    second = {"student.model": "{grown}", "train.domains": ["south"], "train.replay": replay}
    stages = [
        {"name": "north", "set": {"train.domains": ["north"]}},
        {"name": "grown", "set": first | {"train.steps": 4}},
        {"name": "south", "set": second},
    ]
    student = {"model": "models/student", "domain_prompts": True}
    return trained(base, student, evaluate_domains=True, evaluate_every=2) | {"stages": stages}


def prompted(base: Values) -> Values:
    """Return a run that writes text from an expert's answers and trains a student on it."""
    text = "prompts.jsonl"
    changed = {"corpus.source": [text], "cache.path": "caches/prompted", "teachers": []}
    stage = {"name": "prompted", "write_prompts": {"teacher": "sense", "to": text}, "set": changed}
    return trained(base, {"model": "models/student"}) | {"stages": [stage]}


def student_steps(name: str) -> list[Step]:
    """Return the commands that train a student."""
    arguments = ["train-student", f"student-{name}.yaml", "--out", f"students/{name}"]
    if name == "two":
        return [{"arguments": arguments, "processes": 2}]
    if name == "resumed":
        stop = f"students/{name}/metrics.jsonl"
        killed: Step = {"arguments": arguments, "stop": stop, "lines": 10}
        return [killed, {"arguments": [*arguments, "--resume"]}]
    return [{"arguments": arguments}]


def finetune_steps() -> list[Step]:
    """Return the commands that fine-tune a model on a task of each kind."""
    settings = ["epochs=2", "batch_size=8", "max_length=24", "learning_rate=1.0e-3"]
    changes = [part for value in settings for part in ("--set", value)]
    return [
        {
            "arguments": [
                *("finetune", "models/student", "--train", f"{task}-train.jsonl"),
                *("--dev", f"{task}-dev.jsonl", "--out", f"students/{task}", *changes),
            ]
        }
        for task in ("classes", "scores")
    ]


CACHES, STUDENTS = caches(), students()
GROUPS = (*CACHES, *STUDENTS, "finetuned")


def run_files(groups: Sequence[str]) -> dict[str, Values]:
    """Return the run files of these groups by file name, including those of the students'
    caches.
    """
    chosen = {f"student-{name}": values for name, values in STUDENTS.items() if name in groups}
    paths = [values["cache"] for values in chosen.values()]
    needed = {str(cache["path"]) for cache in paths if isinstance(cache, Mapping)}
    made = {n: v for n, v in CACHES.items() if n in groups or f"caches/{n}" in needed}
    return made | chosen


def steps_of(groups: Sequence[str]) -> list[Step]:
    """Return the commands of these groups, in their order."""
    files = run_files(groups)
    steps = cache_steps([name for name in CACHES if name in files])
    for name in STUDENTS:
        if name in groups:
            steps += student_steps(name)
    return steps + (finetune_steps() if "finetuned" in groups else [])
