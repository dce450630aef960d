"""The runs that ``digests.py`` records: text, tokenizers, tiny random models, run files, commands.

Everything is made from fixed seeds and nothing is trained or downloaded. Paths in run files are
relative to the work folder, because a cache repeats them in its metadata.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

Values = dict[str, object]

WORDS = (
    "the a of in to and model teacher student learns guides writes reads small large old new quick "
    "cache token masked causal gradient loss river mountain city engine paper number light water "
    "runs falls rises gives takes keeps under over between beside without against"
).split()
LENGTH = 20  # tokens per sequence
LARGE = 66_000  # tokens of the large vocabulary: ids beyond 65,536 have a plane of their own


class Step(TypedDict, total=False):
    """One command, in the form that ``digests_subject.py`` runs."""

    arguments: list[str]  # of the command line
    processes: int  # 2: as under torchrun
    stop: str  # a metrics.jsonl: the command is killed once it has ``lines`` lines
    lines: int


class Plan(TypedDict):
    """Commands in their order, and what to take digests of afterwards."""

    steps: list[Step]
    caches: list[str]
    students: list[str]  # folders of students, of stages and of fine-tuned experts
    files: list[str]


# --- text -----------------------------------------------------------------------------------------


def sentences(count: int, seed: int) -> list[str]:
    """Sentences of 3 to 12 words."""
    draw = random.Random(seed)
    return [
        " ".join(draw.choices(WORDS, k=draw.randint(3, 12))).capitalize() + "."
        for _ in range(count)
    ]


def write_lines(path: Path, records: Iterator[Values] | list[Values]) -> None:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_text(work: Path) -> None:
    """The corpus, and two labelled tasks: classes of single texts, scores of pairs."""
    write_lines(
        work / "docs.jsonl",
        [
            {
                "id": f"d{number}",
                "text": " ".join(sentences(1 + number * 5 % 7, number)),
                "domain": ("north", "south")[number % 2],
            }
            for number in range(14)
        ],
    )
    for split, first in (("train", 100), ("dev", 200)):
        texts = [sentences(2, first + number) for number in range(24)]
        write_lines(
            work / f"classes-{split}.jsonl",
            [{"text": a, "label": ("short", "long")[len(a) > 40]} for a, _ in texts],
        )
        write_lines(
            work / f"scores-{split}.jsonl",
            [{"sentence1": a, "sentence2": b, "label": len(a) / len(b)} for a, b in texts],
        )


# --- tokenizers and models ------------------------------------------------------------------------


def write_tokenizers(work: Path) -> None:
    """Written, not trained: the trainers break ties anew in every process."""
    from transformers import BertTokenizerFast, GPT2TokenizerFast

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    begin = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *letters]
    begin += ["##" + letter for letter in letters]
    pieces = [piece for word in WORDS for piece in (word[:2], "##" + word[-2:])]
    vocabularies = {
        "wordpiece": [*begin, *pieces, *WORDS[::2]],
        "foreign": [*begin, *WORDS],
        "large": [*begin, *(f"unused{number}" for number in range(LARGE)), *WORDS],
    }
    for name, tokens in vocabularies.items():
        (work / name).mkdir()
        (work / name / "vocab.txt").write_text("\n".join(dict.fromkeys(tokens)) + "\n")
        fast = BertTokenizerFast(vocab=str(work / name / "vocab.txt"), model_max_length=64)
        fast.save_pretrained(work / name)
    merges = [
        (left, right)
        for word in WORDS[::2]
        if len(word) > 2
        for left, right in (("Ġ", word[0]), *((word[:end], word[end]) for end in (1, 2)))
    ]
    merges = list(dict.fromkeys(merges))
    alphabet = [*map(chr, range(33, 127)), "Ġ", "Ċ"]
    tokens = ["<|endoftext|>", *alphabet, *(left + right for left, right in merges)]
    (work / "bytelevel").mkdir()
    numbers = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (work / "bytelevel/vocab.json").write_text(json.dumps(numbers))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (work / "bytelevel/merges.txt").write_text("\n".join(lines) + "\n")
    files = {"vocab": "vocab.json", "merges": "merges.txt"}
    paths = {key: str(work / "bytelevel" / file) for key, file in files.items()}
    GPT2TokenizerFast(**paths, model_max_length=64).save_pretrained(work / "bytelevel")


BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.5,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.3}


def labels(*names: str) -> Values:
    """The configuration of a classifier with these classes."""
    ids = {name: number for number, name in enumerate(names)}
    return {"id2label": dict(enumerate(names)), "label2id": ids}


CLASSIFIER, TAGGER = "AutoModelForSequenceClassification", "AutoModelForTokenClassification"
MASKED, CAUSAL = "AutoModelForMaskedLM", "AutoModelForCausalLM"
# Name -> (tokenizer, transformers class, configuration beside that of the family).
MODELS: dict[str, tuple[str, str, Values]] = {
    "lm": ("wordpiece", MASKED, {}),
    "lm-padded": ("wordpiece", MASKED, {"padding": 5}),
    "lm-large": ("large", MASKED, {"hidden_size": 16, "num_hidden_layers": 1}),
    "gpt": ("bytelevel", CAUSAL, {}),
    "gpt-wordpiece": ("wordpiece", CAUSAL, {}),
    "sense": ("wordpiece", CLASSIFIER, labels("good", "bad", "none")),
    "sense-foreign": ("foreign", CLASSIFIER, labels("bad", "so", "best", "none")),
    "several": (
        "wordpiece",
        CLASSIFIER,
        labels("warm", "wet", "light") | {"problem_type": "multi_label_classification"},
    ),
    "score": ("wordpiece", CLASSIFIER, {"num_labels": 1, "problem_type": "regression"}),
    "tags": ("wordpiece", TAGGER, labels("noun", "verb", "other", "stop")),
    "sense-gpt": ("bytelevel", CLASSIFIER, labels("good", "bad")),
    "student": ("wordpiece", MASKED, {}),
    "student-gpt": ("bytelevel", CAUSAL, {}),
}


def write_models(work: Path, names: list[str]) -> None:
    """Save the models with random weights, each from a seed of its own, with their tokenizers."""
    import torch
    import transformers

    for number, (name, (tokenizer, auto, given)) in enumerate(MODELS.items()):
        if name not in names:
            continue
        fast = transformers.AutoTokenizer.from_pretrained(work / tokenizer)
        extra = dict(given)
        ids = {"vocab_size": len(fast) + int(str(extra.pop("padding", 0))), "pad_token_id": 0}
        gpt = "gpt" in name
        config_class = transformers.GPT2Config if gpt else transformers.BertConfig
        config = config_class(**((GPT if gpt else BERT) | ids | extra))
        torch.manual_seed(number)
        getattr(transformers, auto).from_config(config).save_pretrained(work / "models" / name)
        fast.save_pretrained(work / "models" / name)


def write_material(work: Path, groups: Sequence[str]) -> None:
    """Write everything that the commands of these groups read."""
    write_text(work)
    write_tokenizers(work)
    files = {name: values for name, values in caches().items() if name in groups}
    used = json.dumps(files)
    write_models(work, [name for name in MODELS if f'"models/{name}"' in used])
    for name, values in files.items():
        (work / f"{name}.yaml").write_text(json.dumps(values, indent=1) + "\n")  # YAML, too


# --- caches ---------------------------------------------------------------------------------------


def teacher(name: str, model: str, task: str, **more: object) -> Values:
    """One entry of ``teachers``."""
    return {"name": name, "model": f"models/{model}", "task": task} | more


def vocabulary_teachers(model: str, task: str, every_codec: bool = True) -> list[Values]:
    """A teacher for each kind of vocabulary targets, and for each codec of those that have one."""
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
    """An expert of every task head, of texts and of pairs."""
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
    """A run file without a student."""
    text = {"source": ["docs.jsonl"], "domain_field": "domain", "tokenizer": tokenizer}
    return {
        "corpus": text | {"sequence_length": LENGTH} | corpus,
        "cache": {"path": f"caches/{cache}", "sequences_per_shard": 40, "replicas": 2} | mask,
        "teachers": teachers,
    }


def masked_run() -> Values:
    """Every kind of target of a masked LM, every task head, a causal LM of the same tokenizer."""
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
    """Run files by name; each makes the cache of its name."""
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
    """The commands that make these caches."""
    steps: list[Step] = []
    for name in names:
        for changes in GROWTH if name == "grown" else ([],):
            sets = [part for change in changes for part in ("--set", change)]
            steps.append({"arguments": ["cache-teachers", f"{name}.yaml", *sets]})
    return steps


CACHES = tuple(caches())
GROUPS = CACHES


def plan_of(groups: Sequence[str]) -> Plan:
    """What ``digests_subject.py`` does for these groups."""
    made = [name for name in CACHES if name in groups]
    return {"steps": cache_steps(made), "caches": made, "students": [], "files": []}
