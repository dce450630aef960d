"""MUKI through both stages, against the paper's formulas in plain NumPy.

    u = H(p̄)/log|Y|;  s = 1 − u;  w = softmax(s/0.2) or one-hot;  q = Σ w·pad(softmax(z))
    v = s₍₁₎ − s₍₂₎ + 1e-6;  L = mean v·KL(q ‖ p_S)

One cache serves every variant, and no variant changes a byte of it.
"""

import hashlib
import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.cli import app
from rekindle.pipeline.config import load_config
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.answers.score import score_model
from rekindle.train.finetune.merge_baselines import merge_scores
from rekindle.train.finetune.run import FinetuneConfig
from rekindle.train.finetune.task_data import TaskData
from rekindle.train.model.network import HeadConfig
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student, build_student
from testlib.models import NARROW, STILL

LABELS = {"a": ("cat", "dog"), "b": ("dog", "bird", "cat"), "c": ("sun", "rain", "snow", "wind")}
UNION = ("cat", "dog", "bird", "sun", "rain", "snow", "wind")
APART = tuple(f"{name}/{label}" for name, labels in LABELS.items() for label in labels)
TERM = "train.objective.distill.0"


@pytest.fixture(scope="module")
def expert(make_model, wordpiece):
    def make(name, seed, **extra):
        names = dict(enumerate(LABELS[name]))
        ids = {label: number for number, label in names.items()}
        about = {"id2label": names, "label2id": ids, **NARROW, **extra}
        auto = "AutoModelForSequenceClassification"
        model = str(make_model("bert", auto, wordpiece, seed, **about))
        task, passes = "sequence_classification", {"passes": 16}
        return {"name": name, "model": model, "task": task, "monte_carlo": passes}

    return make


@pytest.fixture(scope="module")
def student_model(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, **NARROW, **STILL))


@pytest.fixture(scope="module")
def run_file(tmp_path_factory, expert, student_model, method_run):
    folder = tmp_path_factory.mktemp("muki")
    teachers = [expert(name, seed) for seed, name in enumerate(LABELS, start=1)]
    term = {"teachers": list(LABELS), "combine": "uncertainty"}
    objective = {"hard": {"weight": 0.0}, "distill": [term]}
    path = method_run(folder, teachers, {"model": student_model}, objective)
    cache_teachers(load_config(path))
    return path


@pytest.fixture(scope="module")
def cache(run_file):
    return Cache.open(load_config(run_file).cache.path)


def softmax(z):
    powers = np.exp(np.asarray(z, np.float64) - np.max(z))
    return powers / powers.sum()


def union_probs(example, labels):
    """Each expert's softmax among all labels."""
    found = []
    for name, own in LABELS.items():
        p = np.zeros(len(labels))
        for label, value in zip(own, softmax(example.targets[name][0].logits), strict=True):
            p[labels.index(label if labels == UNION else f"{name}/{label}")] = value
        found.append(p)
    return np.stack(found)


def muki(example, labels=UNION, selection="soft", margin=True, sharpness=0.2):
    """(q, v) as the paper writes them."""
    s = []
    for name, own in LABELS.items():
        mean = example.targets[name][0].mc_probs.astype(np.float64)
        s.append(1 + (mean * np.log(mean)).sum() / np.log(len(own)))
    s = np.array(s)
    w = softmax(s / sharpness) if selection == "soft" else np.eye(len(s))[s.argmax()]
    best = np.sort(s)[::-1]
    return w @ union_probs(example, labels), best[0] - best[1] + 1e-6 if margin else 1.0


def uniform(example):
    return union_probs(example, UNION).mean(axis=0), 1.0


def concatenated(example, labels=UNION):
    """One softmax over nine logits; what two experts call by one name adds up."""
    every = softmax(np.concatenate([example.targets[name][0].logits for name in LABELS]))
    q = np.zeros(len(labels))
    for apart, value in zip(APART, every, strict=True):
        q[labels.index(apart.split("/")[1] if labels == UNION else apart)] += value
    return q, 1.0


def student_of(run_file, labels):
    """The student before its first step: its head over all labels is the seed's."""
    config = load_config(run_file)
    problem = "single_label_classification"
    head = HeadConfig(kind="sequence", num_labels=len(labels), label_names=labels, problem=problem)
    size = Cache.open(config.cache.path).corpus.info["tokenizer"]["size"]
    return build_student(config.student, {"a+b+c": head}, size, config.train.seed).eval()


def loss_by_hand(run_file, cache, target, labels=UNION):
    student, losses = student_of(run_file, labels), []
    for index in range(len(cache)):
        example = cache.example(index)
        q, v = target(example)
        ids = torch.tensor(example.input_ids).long()[None]
        with torch.no_grad():
            state = student.model.base_model(input_ids=ids).last_hidden_state[0, 0]
            z = student.heads["a+b+c"](state).double().numpy()
        log_p = np.log(softmax(z))
        losses.append(v * sum(x * (np.log(x) - y) for x, y in zip(q, log_p, strict=True) if x > 0))
    return np.mean(losses)


def train(run_file, out, *overrides):
    train_from_config(load_config(run_file, list(overrides)), out)
    return read_metrics(out)[0]


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


VARIANTS = {
    "muki": ([], muki, UNION),
    "hard": (
        [f"{TERM}.uncertainty.selection=hard"],
        lambda e: muki(e, selection="hard"),
        UNION,
    ),
    "no margin": (
        [f"{TERM}.uncertainty.margin=false"],
        lambda e: muki(e, margin=False),
        UNION,
    ),
    "hard, no margin": (
        [f"{TERM}.uncertainty={{selection: hard, margin: false}}"],
        lambda e: muki(e, selection="hard", margin=False),
        UNION,
    ),
    "blunter": (
        [f"{TERM}.uncertainty.sharpness=1.5"],
        lambda e: muki(e, sharpness=1.5),
        UNION,
    ),
    "apart": ([f"{TERM}.labels=apart"], lambda e: muki(e, labels=APART), APART),
    "uniform": ([f"{TERM}.combine=mixture"], uniform, UNION),
    "concatenated": ([f"{TERM}.combine=concatenate"], concatenated, UNION),
    "concatenated, apart": (
        [f"{TERM}.combine=concatenate", f"{TERM}.labels=apart"],
        lambda e: concatenated(e, labels=APART),
        APART,
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_one_line_on_the_same_cache(run_file, cache, tmp_path, variant):
    overrides, target, labels = VARIANTS[variant]
    folder = run_file.parent / "cache"
    before = digests(folder)
    found = train(run_file, tmp_path / "s", *overrides)
    assert digests(folder) == before
    expected = loss_by_hand(run_file, cache, target, labels)
    assert found["loss"] == pytest.approx(expected, rel=1e-4)
    heads = Student.from_pretrained(tmp_path / "s").head_configs
    assert {name: head.label_names for name, head in heads.items()} == {"a+b+c": labels}


def test_the_variants_differ(run_file, cache):
    """Else a variant that is not reached would pass for another."""
    losses = [
        loss_by_hand(run_file, cache, target)
        for _, target, labels in VARIANTS.values()
        if labels == UNION
    ]
    gaps = [abs(x - y) / x for i, x in enumerate(losses) for y in losses[:i]]
    assert min(gaps) > 1e-3


def test_an_expert_without_dropout_is_refused_when_it_is_cached(
    tmp_path, expert, student_model, method_run
):
    still = expert("a", 1, **STILL)
    path = method_run(tmp_path, [still], {"model": student_model}, {})
    with pytest.raises(InputError, match="'a': 16 Monte-Carlo passes are identical"):
        cache_teachers(load_config(path))


def test_the_cached_means_vary(cache):
    """Dropout was on: no mean is the probability of the pass without it."""
    for index in range(len(cache)):
        for name in LABELS:
            target = cache.example(index).targets[name][0]
            assert np.abs(target.mc_probs - softmax(target.logits)).max() > 1e-5


def test_baselines_from_the_cache(cache):
    """The table of merges needs no model: cached logits and means, and labels by example."""
    names = list(LABELS)
    batch = cache.gather(np.arange(len(cache)), names)
    every = [cache.example(i) for i in range(len(cache))]
    truths = [UNION[int(muki(e, selection="hard")[0].argmax())] for e in every]
    classes = tuple(sorted(set(truths)))
    labelled = TaskData(
        [e.text for e in every], None, np.array([classes.index(t) for t in truths]), classes
    )
    found = merge_scores(
        [cache.teacher(name).info for name in names],
        {name: batch.targets[name].logits for name in names},
        {name: batch.targets[name].mc_probs for name in names},
        labelled,
    )
    assert found["MUKI, hard"]["accuracy"] == 1.0
    for way, target in (("uniform mixture", uniform), ("concatenated logits", concatenated)):
        said = [UNION[target(example)[0].argmax()] for example in every]
        right = np.mean([own == truth for own, truth in zip(said, truths, strict=True)])
        assert found[way]["accuracy"] == pytest.approx(right)
    assert found["a alone"]["accuracy"] < 1


def answers(student, cache, text):
    """A trained student's labels for a text, the likeliest first."""
    tokenizer = cache.corpus.tokenizer
    ids = [*tokenizer.prefix, *tokenizer.encode([text])[0].ids, *tokenizer.suffix]
    with torch.no_grad():
        states = student.model.base_model(input_ids=torch.tensor(ids).long()[None])
        logits = student.heads["a+b+c"](states.last_hidden_state[0, 0])
    return [UNION[place] for place in logits.argsort(descending=True)]


def test_the_students_union_head_is_scored_beside_its_experts(run_file, cache, tmp_path, expert):
    """The command of the recipe, on labels of which the student gives three of five."""
    train(run_file, tmp_path / "s", "train.learning_rate=0.01", "train.steps=5")
    student = Student.from_pretrained(tmp_path / "s").eval()
    texts = ["the old river", "a new city of light", "water runs under the mountain", "a cache"]
    rows = [{"text": text, "label": answers(student, cache, text)[0]} for text in texts[:3]]
    rows += [{"text": text, "label": answers(student, cache, text)[1]} for text in texts[2:]]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = (str(tmp_path / "s"), str(path), str(path), str(tmp_path / "scores"))
    found = score_model(*given, config=FinetuneConfig(epochs=0))
    assert found.mean == pytest.approx(3 / 5)
    experts = [expert(name, seed)["model"] for seed, name in enumerate(LABELS, start=1)]
    command = ["finetune", given[0], "--train", given[1], "--dev", given[2], "--out", given[3]]
    command += ["--force"]  # score_model has filled it
    command += ["--set", "epochs=0", "--set", f"merge.experts=[{', '.join(experts)}]"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    table = done.stdout.splitlines()[1:-2]
    assert len(table) == 1 + 3 + 4
    assert table[0].startswith("student, head a+b+c  ")
    assert table[0].split()[-2] == "0.6000"  # of two labels none says yes: there is no F1
