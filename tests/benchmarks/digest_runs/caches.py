"""The caches whose digests ``digests.py`` records: their run files and commands.

Paths in run files are relative to the work folder, because a cache repeats them in its metadata.
"""

from typing import TypedDict

from digest_runs.material import Values

LENGTH = 20  # tokens per sequence


class Step(TypedDict, total=False):
    """One command, in the form that ``subject.py`` runs."""

    arguments: list[str]  # of the command line
    processes: int  # 2: as under torchrun
    stop: str  # a metrics.jsonl: the command is killed once it has ``lines`` lines
    lines: int


def teacher(name: str, model: str, task: str, **more: object) -> Values:
    """Return one entry of ``teachers``."""
    return {"name": name, "model": f"models/{model}", "task": task} | more


def vocabulary_teachers(model: str, task: str, every_codec: bool = True) -> list[Values]:
    """Return a teacher for each kind of vocabulary targets, and for each codec of those that have
    one.
    """
    kinds: dict[str, Values] = {"random": {"k": 6}, "dense": {}, "hidden": {}}
    for kind in ("topk", "threshold"):
        for codec in ("default", "precise", "compact") if every_codec else ("default",):
            suffix = "" if codec == "default" else f"-{codec}"
            kinds[kind + suffix] = {"kind": kind, "k": 8, "codec": codec}
    kinds["threshold-warm"] = {"kind": "threshold", "k": 8, "temperatures": [2.0]}
    return [
        teacher(name, model, task, targets={"kind": name} | kept) for name, kept in kinds.items()
    ]


def experts() -> list[Values]:
    """Return an expert for every task head, on texts and on pairs."""
    classifier, regression = "sequence_classification", "regression"
    return [
        teacher("sense", "sense", classifier),
        teacher("sense-foreign", "sense-foreign", classifier),
        teacher("muki-1", "sense", classifier, monte_carlo={"passes": 3}),
        teacher("muki-2", "sense-foreign", classifier, monte_carlo={"passes": 3}),
        teacher("several", "several", classifier),
        teacher("sense-north", "sense", classifier, domains=["north"]),
        teacher("score", "score", regression),
        teacher("tags", "tags", "token_classification"),
        teacher("adjacent", "sense", classifier, pairs="adjacent"),
        teacher("same-document", "sense", classifier, pairs="same-document"),
        teacher("score-pairs", "score", regression, pairs="random"),
    ]


def run(
    cache: str, tokenizer: str, teachers: list[Values], mask: Values, **corpus: object
) -> Values:
    """Return a run file without a student."""
    text = {"source": ["docs.jsonl"], "domain_field": "domain", "tokenizer": tokenizer}
    return {
        "corpus": text | {"sequence_length": LENGTH} | corpus,
        "cache": {"path": f"caches/{cache}", "sequences_per_shard": 40, "replicas": 2} | mask,
        "teachers": teachers,
    }


def masked_run() -> Values:
    """Return a run with every kind of target of a masked LM, every task head, and a causal LM of
    the same tokenizer.
    """
    masked = vocabulary_teachers("lm", "masked_lm")
    others = [
        teacher("padded", "lm-padded", "masked_lm", targets={"kind": "topk", "k": 8}),
        teacher("plain", "lm", "masked_lm"),
        teacher("clean-topk", "lm", "masked_lm", view="clean", targets={"kind": "topk", "k": 8}),
        teacher("clean-threshold", "lm-padded", "masked_lm", view="clean"),
        teacher("clean-hidden", "lm", "masked_lm", view="clean", targets={"kind": "hidden"}),
        teacher("north", "lm", "masked_lm", domains=["north"], targets={"kind": "topk", "k": 8}),
        teacher(
            "south", "lm-padded", "masked_lm", domains=["south"], targets={"kind": "topk", "k": 8}
        ),
    ]
    causal = [
        entry | {"name": f"causal-{entry['name']}"}
        for entry in vocabulary_teachers("gpt-wordpiece", "causal_lm", every_codec=False)
    ]
    return run("masked", "wordpiece", [*masked, *others, *causal, *experts()], {})


def caches() -> dict[str, Values]:
    """Return run files by name; each makes the cache of its name."""
    two = [
        teacher(kind, "lm", "masked_lm", targets={"kind": kind, "k": 8})
        for kind in ("topk", "threshold")
    ]
    large = [
        teacher(
            str(kept["kind"]) + str(kept.get("codec", "")), "lm-large", "masked_lm", targets=kept
        )
        for kind in ("topk", "threshold")
        for kept in ({"kind": kind, "k": 8}, {"kind": kind, "k": 8, "codec": "compact"})
    ]
    large.append(teacher("random", "lm-large", "masked_lm", targets={"kind": "random", "k": 6}))
    reference = teacher(
        "reference", "lm", "masked_lm", view="clean", targets={"kind": "topk", "k": 8}
    )
    hard = {"mask": {"policy": "hard", "teacher": "reference", "loss_above": 0.1, "limit": 0.4}}
    sense = teacher("sense", "sense-gpt", "sequence_classification")
    causal = [*vocabulary_teachers("gpt", "causal_lm"), sense]
    return {
        "masked": masked_run(),
        "causal": run("causal", "bytelevel", causal, {}, packing="contiguous"),
        "cover": run("cover", "wordpiece", two, {"mask": {"policy": "cover"}}),
        "word": run("word", "wordpiece", two, {"mask": {"unit": "word"}, "seed": 3}),
        "span": run("span", "wordpiece", two, {"mask": {"unit": "span", "probability": 0.3}}),
        "hard": run("hard", "wordpiece", [reference, two[0]], hard),
        "large": run("large", "large", large, {}, limit_sequences=12),
        "grown": run("grown", "wordpiece", two[:1], {}, limit_sequences=18),
    }


# A larger k, a longer corpus and further temperatures, each kept beside what is there.
GROWTH = (
    ["teachers.0.targets.k=4"],
    ["teachers.0.targets.k=6", "corpus.limit_sequences=null"],
    ["teachers.0.targets.temperatures=[1.0,3.0]", "corpus.limit_sequences=null"],
)


def cache_steps(names: list[str]) -> list[Step]:
    """Return the commands that make these caches."""
    steps: list[Step] = []
    for name in names:
        for changes in GROWTH if name == "grown" else ([],):
            sets = [part for change in changes for part in ("--set", change)]
            steps.append({"arguments": ["cache-teachers", f"{name}.yaml", *sets]})
    return steps
