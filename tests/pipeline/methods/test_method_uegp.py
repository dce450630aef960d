"""UEGP and MoEGP through both stages: every expert's loss against its own logits on the text.

One run has a classifier on another tokenizer, a regressor, an expert on pairs, and one that knows
the odd documents alone.
"""

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.cache import Cache
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import load_config
from rekindle.pipeline.train_student import train_from_config
from rekindle.train.model.network import HeadConfig
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import build_student
from testlib.models import NARROW, STILL

CLASSIFIER = "AutoModelForSequenceClassification"
KD_ONLY = "train.objective.hard.weight=0"
MLM_ONLY = "train.objective.distill=[]"
EXPERTS = ("sense", "score", "pair", "odd")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("uegp")


@pytest.fixture(scope="module")
def models(make_model, wordpiece, bytelevel):
    """The directory of each expert, and of the student."""
    return {
        "sense": make_model("roberta", CLASSIFIER, bytelevel, 1, num_labels=3, **NARROW),
        "score": make_model("bert", CLASSIFIER, wordpiece, 2, num_labels=1, **NARROW),
        "pair": make_model("bert", CLASSIFIER, wordpiece, 3, num_labels=2, **NARROW),
        "odd": make_model("bert", CLASSIFIER, wordpiece, 4, num_labels=4, **NARROW),
        "student": make_model("bert", "AutoModelForMaskedLM", wordpiece, 5, **NARROW, **STILL),
    }


@pytest.fixture(scope="module")
def run_file(folder, models, method_run):
    def teacher(name, task="sequence_classification", **extra):
        return {"name": name, "model": str(models[name]), "task": task, **extra}

    teachers = [
        teacher("sense"),
        teacher("score", "regression"),
        teacher("pair", pairs="adjacent"),
        teacher("odd", domains=["odd"]),
    ]
    terms = [{"teachers": [name]} for name in EXPERTS]
    student = {"model": str(models["student"])}
    path = method_run(folder, teachers, student, {"distill": terms})
    cache_teachers(load_config(path))
    return path


@pytest.fixture(scope="module")
def cache(run_file, folder):
    return Cache.open(folder / "cache")


def train(run_file, out, *overrides):
    train_from_config(load_config(run_file, list(overrides)), out)
    return read_metrics(out)[0]


def first_step(metrics):
    """The losses of the first step, by name."""
    return {k: v for k, v in metrics.items() if k == "ce" or k.startswith("kd/")}


def initial(run_file, cache, *overrides):
    """The student of a run before its first step."""
    config = load_config(run_file, list(overrides))
    names = [name for term in config.train.objective.distill for name in term.teachers]
    heads = {name: HeadConfig.of(cache.teacher(name).info) for name in names}
    size = cache.corpus.info["tokenizer"]["size"]
    return build_student(config.student, heads, size, config.train.seed).eval()


def student_logits(student, name, tokenizer, example):
    """One head on one example alone, through transformers."""
    inputs = {"input_ids": torch.tensor(example.input_ids).long()[None]}
    if name == "pair":
        [pair] = example.pairs.values()
        ids, types = tokenizer.encode_pair(*pair, max_length=24)
        inputs = {"input_ids": torch.tensor(ids).long()[None]}
        inputs["token_type_ids"] = torch.tensor(types).long()[None]
    return student.heads[name](student.model.base_model(**inputs).last_hidden_state[0, 0])


def rows_of(student, name, cache):
    """(example, student's logits, expert's logits) where the expert has an opinion."""
    tokenizer = cache.corpus.tokenizer
    for index in range(len(cache)):
        example = cache.example(index)
        for target in example.targets[name]:
            wanted = torch.tensor(target.logits)
            yield example, student_logits(student, name, tokenizer, example), wanted


def by_hand(student, name, cache):
    """KL for classes, squared error for scores; a mean over the examples that there are."""
    losses = []
    with torch.no_grad():
        for _, own, wanted in rows_of(student, name, cache):
            if name == "score":
                losses.append(float((own - wanted).square().mean()))
                continue
            q, log_p = torch.softmax(wanted, 0), torch.log_softmax(own, 0)
            losses.append(float((q * (q.log() - log_p)).sum()))
    return float(np.mean(losses)), len(losses)


def test_every_experts_loss_is_as_by_hand_over_the_examples_it_knows(run_file, cache, tmp_path):
    found = first_step(train(run_file, tmp_path / "s"))
    student = initial(run_file, cache)
    counts = {}
    for name in EXPERTS:
        expected, counts[name] = by_hand(student, name, cache)
        assert found[f"kd/{name}"] == pytest.approx(expected, rel=1e-4), name
        assert expected > 0.01
    odd = sum(cache.example(i).domain == "odd" for i in range(12))
    assert counts["sense"] == counts["score"] == 12
    assert counts["odd"] == odd
    assert 0 < odd < 12
    assert 0 < counts["pair"] < 12


def test_an_example_that_lacks_a_task_changes_nothing_else(run_file, tmp_path):
    """Without the expert of odd documents, the other losses are what they were."""
    every = first_step(train(run_file, tmp_path / "all"))
    three = ", ".join(f"{{teachers: [{name}]}}" for name in EXPERTS[:3])
    rest = first_step(train(run_file, tmp_path / "rest", f"train.objective.distill=[{three}]"))
    assert rest.keys() == every.keys() - {"kd/odd"}
    for name, value in rest.items():
        assert value == pytest.approx(every[name], rel=1e-6)


def test_the_expert_with_another_tokenizer_saw_the_text(cache, models, bytelevel):
    model = AutoModelForSequenceClassification.from_pretrained(str(models["sense"])).eval()
    tokenizer = AutoTokenizer.from_pretrained(str(models["sense"]))
    assert cache.teacher("sense").info.fingerprints["tokenizer"] != cache.tokenizer_digest
    for index in range(len(cache)):
        example = cache.example(index)
        inputs = tokenizer(example.text, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            own = model(**inputs).logits[0]
        assert example.targets["sense"][0].logits == pytest.approx(own.numpy(), abs=1e-4)


def moved(run_file, cache, out, *overrides):
    """Parts of the student of which a weight has changed after two steps at a real rate."""
    faster = ["train.learning_rate=0.01", "train.steps=2"]
    train(run_file, out, *overrides, *faster)
    before = dict(initial(run_file, cache, *overrides).state_dict())
    after = {f"model.{k}": v for k, v in load_file(out / "model.safetensors").items()}
    after |= {f"heads.{k}": v for k, v in load_file(out / "heads.safetensors").items()}
    parts = {}
    for name, value in after.items():
        part = "mlm head" if ".cls." in name else name.split(".")[0]
        part = name.split(".")[1] if part == "heads" else part
        parts.setdefault(part, []).append(not torch.equal(value, before[name]))
    assert all(all(m) or not any(m) for p, m in parts.items() if p != "model"), parts
    return {part for part, changed in parts.items() if any(changed)}


@pytest.mark.parametrize(
    ("overrides", "losses", "parts"),
    [
        ([KD_ONLY], {f"kd/{n}" for n in EXPERTS}, {"model", *EXPERTS}),
        ([MLM_ONLY], {"ce"}, {"model", "mlm head"}),
        ([], {"ce", *(f"kd/{n}" for n in EXPERTS)}, {"model", "mlm head", *EXPERTS}),
        (
            [f"train.objective.distill.{n}.weight=0" for n in range(1, 4)],
            {"ce", "kd/sense"},
            {"model", "mlm head", "sense"},
        ),
    ],
    ids=["KD only", "MLM only", "both", "one expert"],
)
def test_an_ablation_trains_exactly_what_it_says(
    run_file, cache, tmp_path, overrides, losses, parts
):
    assert first_step(train(run_file, tmp_path / "still", *overrides)).keys() == losses
    assert moved(run_file, cache, tmp_path / "moving", *overrides) == parts


def test_weights_of_the_two_sides_add_up(run_file, tmp_path):
    """L = μ·CE + Σ λ·D, each weight a line."""
    weights = ["train.objective.hard.weight=0.3", "train.objective.distill.1.weight=0.2"]
    found = train(run_file, tmp_path / "s", *weights)
    terms = first_step(found)
    total = 0.3 * terms["ce"] + terms["kd/sense"] + 0.2 * terms["kd/score"]
    assert found["loss"] == pytest.approx(total + terms["kd/pair"] + terms["kd/odd"], rel=1e-5)


RANKING = "train.objective.distill.1.ranking"


def ranking_by_hand(student, cache, group):
    rows = []
    with torch.no_grad():
        for example, own, wanted in rows_of(student, "score", cache):
            rows.append((getattr(example, group, ""), float(own - wanted)))
    pairs = [(e - f) ** 2 for (g, e), (h, f) in combinations(rows, 2) if g == h]
    return np.mean([e**2 for _, e in rows]) + 0.5 * np.mean(pairs), len(pairs)


@pytest.mark.parametrize("group", ["batch", "domain", "document"])
def test_a_ranking_expert_teaches_scores_and_their_differences(run_file, cache, tmp_path, group):
    expected, pairs = ranking_by_hand(initial(run_file, cache), cache, group)
    assert 0 < pairs <= 66
    assert (pairs == 66) == (group == "batch")
    for micro in ("null", 5, 1) if group == "batch" else (5,):  # in several, as the whole
        chosen = [f"{RANKING}.pairwise=0.5", f"{RANKING}.group={group}"]
        chosen += [f"train.micro_batch_sequences={micro}"]
        found = train(run_file, tmp_path / f"{micro}", *chosen)
        assert found["kd/score"] == pytest.approx(expected, rel=1e-4)


def test_micro_batches_train_the_same_ranking_student(run_file, tmp_path):
    """Weights, not only the loss: the gradient of pairs that lie in two micro-batches is there."""
    chosen = [f"{RANKING}.pointwise=0.1", KD_ONLY, "train.learning_rate=0.001", "train.steps=3"]
    found = []
    for micro in ("null", 5):
        out = tmp_path / f"{micro}"
        train(run_file, out, *chosen, f"train.micro_batch_sequences={micro}")
        found.append(load_file(out / "heads.safetensors"))
    for name, value in found[0].items():
        assert torch.allclose(value, found[1][name], atol=2e-5), name


def test_pseudo_labels_teach_where_the_expert_is_sure(run_file, cache, tmp_path):
    """Below the confidence there is no loss, and no coverage."""
    rows = [
        (torch.softmax(wanted, 0), own.detach())
        for _, own, wanted in rows_of(initial(run_file, cache), "sense", cache)
    ]
    least = float(np.median([q.max() for q, _ in rows]))
    sure = [F.cross_entropy(own, q.argmax()) for q, own in rows if q.max() >= least]
    assert 4 <= len(sure) <= 8
    term = f"{{teachers: [sense], divergence: pseudo_label, confidence: {least - 1e-6}}}"
    config = load_config(run_file, [f"train.objective.distill=[{term}]"])
    result = train_from_config(config, tmp_path / "s")
    found = read_metrics(tmp_path / "s")[0]["kd/sense"]
    assert found == pytest.approx(float(torch.stack(sure).mean()), rel=1e-4)
    assert result.coverage["sequences_with_kd"] == len(sure)
    assert result.coverage["sequences_ce_only"] == 12 - len(sure)
