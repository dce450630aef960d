"""Replaced-token detection: what is sampled, what is judged, the loss, and what is left behind."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.stats import chi2

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.config import RunConfig
from rekindle.train.config import StudentConfig, TrainConfig
from rekindle.train.device_batch import DecodedTargets, split_batch
from rekindle.train.distributed import World
from rekindle.train.loop import train_student
from rekindle.train.methods.replaced_tokens import ReplacedTokenHead
from rekindle.train.objective.drawing import sample
from rekindle.train.prepare import prepare, prepare_objective
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student

CPU = torch.device("cpu")
RTD = {"method": "replaced_tokens"}
KINDS = {
    "topk": {"kind": "topk", "k": 6, "temperatures": [1.0, 3.0]},
    "precise": {"kind": "topk", "k": 6, "codec": "precise"},
    "threshold": {"kind": "threshold", "k": 6},
    "random": {"kind": "random", "k": 12},
    "dense": {"kind": "dense"},
    "hidden": {"kind": "hidden"},
}
NARROW = {"hidden_size": 16, "intermediate_size": 24}
STILL = NARROW | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, corpus_file, wordpiece, make_model):
    """A cache with a teacher of each kind, all of one model, and a classifier."""
    torch.set_num_threads(1)
    flat = {"initializer_range": 0.2}
    model = str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 1, **NARROW, **flat))
    expert = str(make_model("bert", "AutoModelForSequenceClassification", wordpiece, 6, **NARROW))
    lm = {"model": model, "task": "masked_lm"}
    teachers = [lm | {"name": name, "targets": targets} for name, targets in KINDS.items()]
    teachers += [lm | {"name": "odd", "targets": KINDS["topk"], "domains": ["odd"]}]
    teachers += [{"name": "sense", "model": expert, "task": "sequence_classification"}]
    path = tmp_path_factory.mktemp("rtd") / "cache"
    values = {
        "corpus": {
            "source": str(corpus_file),
            "tokenizer": str(wordpiece),
            "domain_field": "domain",
            "sequence_length": 24,
            "limit_sequences": 24,
        },
        "cache": {"path": str(path), "sequences_per_shard": 16, "replicas": 2},
        "teachers": teachers,
    }
    cache_teachers(parse_settings(RunConfig, values))
    return path


@pytest.fixture(scope="module")
def student(wordpiece, make_model):
    return make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **STILL)


def config_of(methods, hard=1.0, **values):
    objective = {"hard": {"weight": hard}, "methods": methods}
    return parse_settings(TrainConfig, {"objective": objective, "held_out": 0.2} | values)


def rtd_student(model, **values):
    return StudentConfig(model=str(model), task="replaced_token_detection", **values)


def method_of(path, teacher="topk", seed=0, **values):
    """The method alone, for the only masks of a cache."""
    cache = Cache.open(path)
    config = config_of([RTD | {"teacher": teacher} | values], seed=seed)
    view = cache.masked_view().name
    return cache, prepare_objective(cache, rtd_student("m"), config, view).methods[0]


def gather(cache, method, index=None, epoch=0):
    index = np.arange(len(cache)) if index is None else np.asarray(index)
    view = cache.masked_view().name
    return cache.gather(index, method.teachers, epoch=epoch, masked_view=view)


# --- what is sampled ---


def distribution(target, row, temperature, special):
    """Probabilities [V] of a position, by hand: kept ids; the tail over all others alike."""
    ids, log_probs, log_tail = target.decode(temperature)
    out = np.zeros(len(special))
    tail = float(np.exp(np.float64(log_tail[row])))
    kept = ids[row][ids[row] >= 0]
    out[kept] = np.exp(log_probs[row][ids[row] >= 0].astype(np.float64))
    others = [i for i in range(len(special)) if not special[i] and i not in set(kept.tolist())]
    out[others] += tail / max(len(others), 1)
    return out / out.sum()


def fits(counts, expected):
    """Pearson's chi-squared at 1 in 100,000; outcomes that are rare are one outcome."""
    assert not counts[expected == 0].any()
    rare = expected < 5
    cells = [(c, e) for c, e in zip(counts[~rare], expected[~rare], strict=True)]
    if expected[rare].sum() > 5:
        cells.append((counts[rare].sum(), expected[rare].sum()))
    statistic = sum((c - e) ** 2 / e for c, e in cells)
    return statistic < chi2.ppf(1 - 1e-5, max(len(cells) - 1, 1))


DRAWS = 3000
CASES = [(kind, 1.0) for kind in KINDS] + [("topk", 3.0), ("dense", 2.0), ("hidden", 0.5)]


@pytest.mark.parametrize(("kind", "temperature"), CASES)
def test_replacements_follow_the_teachers_distribution(kinds, kind, temperature):
    """Over many epochs, at positions of one sequence: kept ids, and the tail over all others."""
    cache, method = method_of(kinds, kind, temperature=temperature)
    batch = gather(cache, method, [3])
    target = batch.targets[kind]
    assert len(target.rows) > 1
    drawn = torch.stack(
        [method._sample(replace(batch, epoch=n), target, CPU) for n in range(DRAWS)]
    ).numpy()
    for row in range(len(target.rows)):
        expected = DRAWS * distribution(target, row, temperature, method.special)
        counts = np.bincount(drawn[:, row], minlength=len(expected))
        assert fits(counts, expected), row


def test_the_distribution_of_another_temperature_is_told_apart(kinds):
    """The test above can fail."""
    cache, method = method_of(kinds, "topk")
    batch = gather(cache, method, [3])
    target = batch.targets["topk"]
    drawn = torch.stack(
        [method._sample(replace(batch, epoch=n), target, CPU) for n in range(DRAWS)]
    ).numpy()
    wrong = 0
    for row in range(len(target.rows)):
        expected = DRAWS * distribution(target, row, 3.0, method.special)
        wrong += not fits(np.bincount(drawn[:, row], minlength=len(expected)), expected)
    assert wrong == len(target.rows)


@st.composite
def sparse_rows(draw):
    """(V, special ids, kept ids, probabilities, tail, two numbers) of one position."""
    size = draw(st.integers(2, 12))
    kept = draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
    special = draw(st.sets(st.integers(0, size - 1), max_size=size - 1))
    mass = draw(st.lists(st.integers(0, 5), min_size=len(kept), max_size=len(kept)))
    tail = draw(st.integers(0, 5))
    padding = draw(st.integers(0, 3))
    return size, special, kept, mass, tail, padding


@settings(max_examples=150, deadline=None)
@given(sparse_rows())
def test_every_outcome_has_exactly_its_share_of_the_random_numbers(row):
    """Over a grid of both numbers: the inverse of the cumulative sum, outcome by outcome."""
    size, special, kept, mass, tail, padding = row
    content = [i for i in range(size) if i not in special]
    others = [i for i in content if i not in kept]
    total = sum(mass) + (tail if others else 0)
    if total == 0:
        return
    probs = [m / total for m in mass] + [0.0] * padding
    ids = [*kept, *[-1] * padding]
    fine = max(len(others), 1)
    first, second = np.meshgrid((np.arange(total) + 0.5) / total, (np.arange(fine) + 0.5) / fine)
    uniforms = torch.tensor(np.stack([first.ravel(), second.ravel()], 1))
    targets = DecodedTargets(
        torch.tensor([ids] * len(uniforms)),
        torch.tensor([probs] * len(uniforms)),
        torch.full((len(uniforms),), tail / total),
    )
    found = sample(targets, uniforms, torch.tensor(content)).tolist()
    for token in range(size):
        share = fine * mass[kept.index(token)] if token in kept else tail * (token in others)
        assert found.count(token) == share, token


@pytest.mark.parametrize("edge", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_random_numbers_choose_what_has_mass(edge):
    """At the first and the last number: no outcome of probability 0, no id past the end."""
    ids = torch.tensor([[4, 2, 7, -1], [4, 2, 7, -1], [1, 3, 5, 6]])
    probs = torch.tensor([[0.0, 0.7, 0.3, 0.0], [0.0, 0.6, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]])
    tail = torch.tensor([0.0, 0.4, 0.0])
    found = sample(DecodedTargets(ids, probs, tail), torch.full((3, 2), edge), torch.arange(1, 9))
    assert found.tolist() == ([2, 2, 1] if edge == 0 else [7, 8, 6])


def replacements(method, batch):
    """{(example, position): token} at every masked position."""
    text = method.corrupted(batch, CPU)
    ids = text.inputs["input_ids"].numpy()
    target = batch.targets[method.teacher]
    places = zip(target.rows.tolist(), target.positions.tolist(), strict=True)
    return {(int(batch.index[r]), p): int(ids[r, p]) for r, p in places}


@pytest.mark.parametrize("kind", KINDS)
def test_a_replacement_depends_on_no_batch(kinds, kind):
    """Any order, batch size, world and micro-batch gives every position the same token."""
    cache, method = method_of(kinds, kind)
    whole = replacements(method, gather(cache, method))
    view = cache.teacher(kind).info.view
    masked = cache.gather(np.arange(len(cache)), [], masked_view=view).masked
    assert len(whole) == len(masked.positions) > 50
    shuffled = np.random.default_rng(3).permutation(len(cache))
    for size in (1, 5, len(cache)):
        found = {}
        for start in range(0, len(cache), size):
            batch = gather(cache, method, shuffled[start : start + size])
            found |= replacements(method, batch)
        assert found == whole
    ranks = [replacements(method, gather(cache, method, shuffled[rank::3])) for rank in range(3)]
    assert ranks[0] | ranks[1] | ranks[2] == whole
    parts = split_batch(gather(cache, method, shuffled), 7)
    assert {k: v for part in parts for k, v in replacements(method, part).items()} == whole


def test_an_epoch_and_a_seed_draw_anew(kinds):
    cache, method = method_of(kinds)
    first = replacements(method, gather(cache, method, epoch=0))
    again = replacements(method, gather(cache, method, epoch=2))  # the same masks: two replicas
    assert first.keys() == again.keys()
    assert first != again
    assert first.keys() != replacements(method, gather(cache, method, epoch=1)).keys()
    assert first != replacements(method_of(kinds, seed=1)[1], gather(cache, method))
    assert first == replacements(method_of(kinds)[1], gather(cache, method))


# --- what is judged ---


def test_labels_say_which_tokens_are_not_the_original(kinds):
    cache, method = method_of(kinds)
    special = set(cache.corpus.tokenizer.special_ids)
    same = sum(labels_of_an_epoch(cache, method, special, epoch) for epoch in range(12))
    assert same > 0  # a token that was sampled as it was is an original one


def labels_of_an_epoch(cache, method, special, epoch):
    """Checks all labels; how many replacements are the original."""
    batch = gather(cache, method, epoch=epoch)
    text = method.corrupted(batch, CPU)
    drawn = replacements(method, batch)
    expected, same = {}, 0
    for row, index in enumerate(batch.index.tolist()):
        for place, token in enumerate(cache.example(index).input_ids.tolist()):
            if token not in special:
                shown = drawn.get((index, place), token)
                expected[row, place] = (shown != token, shown)
                same += (index, place) in drawn and shown == token
    assert 0 < sum(label for label, _ in expected.values()) == len(drawn) - same
    width = batch.input_ids.shape[1]
    ids = text.inputs["input_ids"].flatten()
    found = {
        divmod(flat, width): (label, int(ids[flat]))
        for flat, label in zip(text.judged.tolist(), text.replaced.tolist(), strict=True)
    }
    assert found == expected
    assert method.count(batch) == {"loss": len(expected)}
    # What is not judged stays as it is, padding included.
    untouched = np.ones(batch.input_ids.size, bool)
    untouched[text.judged.numpy()] = False
    assert (ids.numpy()[untouched] == batch.input_ids.flatten()[untouched]).all()
    return same


def test_sequences_without_targets_are_not_judged(kinds):
    cache, method = method_of(kinds, "odd")
    batch = gather(cache, method)
    domains = np.array([str(d) for d in batch.domains])
    assert {"odd", "even"} == set(domains)
    text = method.corrupted(batch, CPU)
    rows = np.unique(text.judged.numpy() // batch.input_ids.shape[1])
    assert rows.tolist() == np.flatnonzero(domains == "odd").tolist()
    none = gather(cache, method, np.flatnonzero(domains == "even"))
    assert method.count(none) == {"loss": 0}
    assert len(method.corrupted(none, CPU).judged) == 0


# --- the loss ---


class Setting:
    """An objective, its student with all weights away from their initial values, and a batch."""

    def __init__(self, path, model, methods, hard=1.0, task="replaced_token_detection"):
        self.cache = Cache.open(path)
        self.view = self.cache.masked_view().name
        config = config_of(methods, hard, batch_sequences=4, steps=10)
        chosen = StudentConfig(model=str(model), task=task)
        prepared = prepare(self.cache, chosen, config, self.view, World.alone())
        self.objective, self.student = prepared.objective, prepared.student.eval()
        draw = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.05)

    def batch(self, index):
        teachers = self.objective.teachers_at(0)
        found = self.cache.gather(np.asarray(index), teachers, masked_view=self.view)
        return self.objective.select(found, 0)

    def run(self, parts, counts):
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in parts:
            result = self.objective.loss(self.student, part, counts, 0, CPU)
            result.total.backward()
            loss += float(result.total.detach())
            for name, value in result.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value)
        return loss, terms, self.gradients()

    def gradients(self):
        return {n: p.grad.clone() for n, p in self.student.named_parameters() if p.grad is not None}

    def head(self, states):
        """Dense, GELU, one output, from the weights by their names."""
        weights = dict(self.student.named_parameters())
        name = "heads.method:replaced_tokens."
        if name + "dense.weight" not in weights:
            name = "model.discriminator_predictions."
        w = {k.removeprefix(name): v for k, v in weights.items() if k.startswith(name)}
        inner = F.gelu(states @ w["dense.weight"].T + w["dense.bias"])
        return inner @ w["dense_prediction.weight"][0] + w["dense_prediction.bias"]

    def reference(self, index, hard, weight):
        """(loss, bare RTD loss): example by example, without padding."""
        method = self.objective.methods[0]
        special = self.cache.corpus.tokenizer.special_ids
        ce, rtd, labels, judged = 0.0, 0.0, 0, 0
        for number in index:
            clean = self.cache.example(number).input_ids
            one = self.cache.gather(
                np.array([number]), [method.teacher], epoch=0, masked_view=self.view
            )
            changed = clean.copy()
            for (_, place), token in replacements(method, one).items():
                changed[place] = token
            ids = torch.as_tensor(changed).long()[None]
            states = self.student.model.base_model(ids).last_hidden_state[0]
            keep = [i for i, token in enumerate(clean.tolist()) if token not in special]
            p = torch.sigmoid(self.head(states[keep]).double())
            y = torch.as_tensor(changed != clean)[keep].double()
            rtd = rtd - (y * p.log() + (1 - y) * (1 - p).log()).sum()
            judged += len(keep)
            masked = one.masked
            seen = torch.as_tensor(masked.input_ids).long()
            logits = self.student.model(seen).logits[0][masked.positions]
            logits = logits[:, : self.student.vocabulary_size]
            ce = ce + F.cross_entropy(logits, torch.as_tensor(masked.labels), reduction="sum")
            labels += len(masked.labels)
        return hard * ce / labels + weight * rtd / judged, float(rtd.detach()) / judged


@pytest.fixture(scope="module")
def electra(wordpiece, make_model):
    return make_model("electra", "AutoModelForMaskedLM", wordpiece, 3, **STILL)


@pytest.mark.parametrize(
    ("family", "hard", "term"),
    [
        ("bert", 1.0, {"teacher": "topk"}),
        ("bert", 0.0, {"teacher": "threshold", "weight": 1.0}),
        ("bert", 0.3, {"teacher": "dense", "temperature": 2.0, "weight": 7.0}),
        ("electra", 1.0, {"teacher": "random"}),
    ],
)
def test_loss_and_gradient_are_the_references(kinds, student, electra, family, hard, term):
    model = student if family == "bert" else electra
    setting = Setting(kinds, model, [RTD | term], hard)
    index = [2, 3, 7, 11, 12]
    batch = setting.batch(index)
    counts = setting.objective.counts(batch, 0)
    whole = setting.run([batch], counts)
    setting.student.zero_grad(set_to_none=True)
    expected, bare = setting.reference(index, hard, term.get("weight", 50.0))
    expected.backward()
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert whole[1]["replaced_tokens/loss"] == pytest.approx(bare, rel=1e-5)
    assert ("ce" in whole[1]) == (hard > 0)
    assert_same_gradients(whole[2], setting.gradients())
    heads = [n for n in whole[2] if "method:" in n or "discriminator" in n]
    assert len(heads) == 4
    for size in (1, 2, 4):  # micro-batches
        split = setting.run(split_batch(batch, size), counts)
        assert split[0] == pytest.approx(whole[0], rel=1e-5)
        assert_same_gradients(split[2], whole[2])
    apart = [setting.batch(index[rank::2]) for rank in range(2)]  # processes
    counted = [setting.objective.counts(part, 0) for part in apart]
    assert (
        sum(c.rows["replaced_tokens/loss"] for c in counted) == counts.rows["replaced_tokens/loss"]
    )
    assert_same_gradients(setting.run(apart, counts)[2], whole[2])


def assert_same_gradients(found, expected):
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    zero = torch.zeros(())
    for name in found.keys() | expected.keys():
        a, b = found.get(name, zero), expected.get(name, zero)
        assert float((a - b).abs().max()) <= 2e-5 * scale, name


def test_a_batch_without_any_target_has_a_loss_of_nothing(kinds, student):
    """The pass is made all the same: other processes may have rows."""
    setting = Setting(kinds, student, [RTD | {"teacher": "odd"}], 0.0)
    domains = setting.batch(range(24)).domains
    even = [i for i, domain in enumerate(domains) if domain == "even"][:2]
    batch = setting.batch(even)
    loss, terms, found = setting.run([batch], setting.objective.counts(batch, 0))
    assert (loss, terms) == (0.0, {"replaced_tokens/loss": 0.0})
    assert any("method:" in name for name in found)


# --- the configuration ---


def objective_of(path, task, methods, hard=1.0):
    cache = Cache.open(path)
    config = config_of(methods, hard)
    view = cache.masked_view().name
    return prepare_objective(cache, StudentConfig(model="m", task=task), config, view)


def test_the_task_brings_the_method_with_it(masked_world, kinds):
    rtd = "replaced_token_detection"
    (method,) = objective_of(kinds, rtd, [RTD | {"teacher": "random", "weight": 2.0}]).methods
    assert (method.teacher, method.settings.weight) == ("random", 2.0)
    for path in (kinds, masked_world.path):  # several masked LMs: which?
        with pytest.raises(InputError, match="Name one"):
            objective_of(path, rtd, [])
    assert not objective_of(kinds, "masked_lm", []).methods


def test_the_only_masked_teacher_is_taken(experts_world):
    """With ELECTRA's weights: 1 and 50."""
    objective = objective_of(experts_world.path, "replaced_token_detection", [])
    assert objective.methods[0].teacher == "lm"
    assert objective.weights(0) == (1.0, 50.0)
    assert objective.teachers_at(0) == ["lm"]
    falling = {"schedule": "step", "from": 50, "to": 0, "over": 0.5}
    later = objective_of(experts_world.path, "masked_lm", [RTD | {"weight": falling}])
    assert later.teachers_at(499) == ["lm"]
    assert later.teachers_at(500) == []


@pytest.mark.parametrize(
    ("term", "told"),
    [
        ({"teacher": "sense"}, "'sense' is a sequence_classification that saw text"),
        ({"teacher": "nobody"}, "no teacher 'nobody'"),
        ({"teacher": "topk", "temperature": 2.0}, r"stores the temperatures \[1.0, 3.0\], not 2.0"),
        ({"teacher": "topk", "temperatur": 1.0}, "methods.0.*'temperatur'.*mean 'temperature'"),
        ({"teacher": "topk", "weight": -1}, "methods.0.*weight"),
    ],
)
def test_what_cannot_be_sampled_is_refused(kinds, term, told):
    with pytest.raises(InputError, match=told):
        objective_of(kinds, "replaced_token_detection", [RTD | term])


def test_a_causal_student_has_nothing_to_replace(causal_world):
    cache = causal_world.open()
    with pytest.raises(InputError, match="causal_lm student has no masked view"):
        prepare_objective(cache, StudentConfig(model="m", task="causal_lm"), config_of([RTD]), None)


# --- a whole run ---


QUICK = {
    "steps": 6,
    "batch_sequences": 4,
    "micro_batch_sequences": 3,
    "warmup_steps": 1,
    "checkpoint_every": 3,
    "evaluate_every": 3,
    "keep_best": "replaced_tokens/f1",
}


def train(path, student_config, out, resume=False, report=lambda step, values: None, **values):
    config = config_of([RTD | {"teacher": "topk"}], **QUICK | values)
    cache = Cache.open(path)
    return train_student(cache, student_config, config, out, resume=resume, report=report)


def test_a_run_leaves_its_head_and_its_values(kinds, student, tmp_path):
    """And the directory is an ordinary masked LM, whose head goes on in a further run."""
    out = tmp_path / "run"
    result = train(kinds, rtd_student(student), out)
    assert {f"replaced_tokens/{v}" for v in ("loss", "accuracy", "precision", "recall", "f1")} >= {
        n for n in result.evaluation if n.startswith("replaced")
    }
    assert 0 < result.evaluation["replaced_tokens/accuracy"] <= 1
    assert result.coverage["sequences_with_kd"] == 4 * QUICK["steps"]  # its targets are used
    assert result.coverage["positions_ce_only"] == 0
    steps = [r for r in read_metrics(out) if r["kind"] == "train"]
    for r in steps:
        assert r["loss"] == pytest.approx(r["ce"] + 50 * r["replaced_tokens/loss"], rel=1e-5)
    from transformers import AutoModelForMaskedLM

    _, info = AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    saved = load_file(out / "heads.safetensors")
    again = Student.from_pretrained(out)
    assert isinstance(again.method_module("replaced_tokens"), ReplacedTokenHead)
    for name, values in again.method_module("replaced_tokens").state_dict().items():
        assert torch.equal(values, saved[f"method:replaced_tokens.{name}"])
    cache = Cache.open(kinds)
    second = prepare(
        cache, rtd_student(out), config_of([RTD | {"teacher": "topk"}]), None, World.alone()
    ).student
    for name, values in second.method_module("replaced_tokens").state_dict().items():
        assert torch.equal(values, saved[f"method:replaced_tokens.{name}"])


def test_held_out_values_are_those_of_all_tokens_together(kinds, student, tmp_path):
    """Ratios of sums over batches, whatever their size."""
    out = tmp_path / "run"
    result = train(kinds, rtd_student(student), out)
    cache, method = method_of(kinds, "topk")
    trained = Student.from_pretrained(out).eval()
    from rekindle.train.order.split import split_corpus

    index = split_corpus(cache, 0.2).held_out.spread(256)
    with torch.no_grad():
        text = method.corrupted(gather(cache, method, index), CPU)
        logits = method._logits(trained, text)
    y, called = text.replaced, logits > 0
    losses = F.softplus(torch.where(y, -logits, logits))
    right, wrong, missed = (called & y).sum(), (called & ~y).sum(), (~called & y).sum()
    found = {k.split("/")[1]: v for k, v in result.evaluation.items() if k.startswith("replaced")}
    assert found["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    assert found["accuracy"] == pytest.approx(float((called == y).float().mean()))
    assert found["recall"] == pytest.approx(float(right / (right + missed)))
    assert found["f1"] == pytest.approx(float(2 * right / (2 * right + wrong + missed)))
    if right + wrong:
        assert found["precision"] == pytest.approx(float(right / (right + wrong)))


def test_a_run_learns_which_tokens_are_replaced(kinds, student, tmp_path):
    result = train(
        kinds, rtd_student(student), tmp_path / "run",
        steps=60, hard=0.0, learning_rate=3e-3, evaluate_every=60, checkpoint_every=60,
        keep_best="replaced_tokens/loss",
    )  # fmt: skip
    steps = [r["replaced_tokens/loss"] for r in read_metrics(result.directory) if "loss" in r]
    assert np.mean(steps[-10:]) < 0.7 * np.mean(steps[:5])


def test_an_electra_student_is_an_electra_discriminator(kinds, electra, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, ElectraForPreTraining

    out = tmp_path / "run"
    train(kinds, rtd_student(electra), out)
    model, info = AutoModelForPreTraining.from_pretrained(out, output_loading_info=True)
    assert isinstance(model, ElectraForPreTraining)
    assert not info["missing_keys"]
    assert not AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)[1][
        "missing_keys"
    ]
    # It judges as the student does.
    cache, method = method_of(kinds, "topk")
    text = method.corrupted(gather(cache, method, [1, 4, 5]), CPU)
    trained = Student.from_pretrained(out).eval()
    with torch.no_grad():
        ours = method._logits(trained, text)
        theirs = model.eval()(**text.inputs).logits.flatten()[text.judged]
    torch.testing.assert_close(ours, theirs)
    # And a discriminator's head is taken over as it is.
    model.save_pretrained(tmp_path / "discriminator")
    config = config_of([RTD | {"teacher": "topk"}])
    chosen = rtd_student(tmp_path / "discriminator")
    begun = prepare(cache, chosen, config, None, World.alone()).student
    head = begun.model.discriminator_predictions.state_dict()
    assert all(
        torch.equal(v, head[k]) for k, v in model.discriminator_predictions.state_dict().items()
    )


class Stopped(Exception):
    pass


def test_a_stopped_run_goes_on_to_the_same_bits(kinds, make_model, wordpiece, tmp_path):
    """With dropout, the head's weights and its moments included."""
    noisy = make_model("bert", "AutoModelForMaskedLM", wordpiece, 10, **NARROW)

    def stop(step, values):
        if step == 5:
            raise Stopped

    train(kinds, rtd_student(noisy), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(kinds, rtd_student(noisy), tmp_path / "run", report=stop)
    train(kinds, rtd_student(noisy), tmp_path / "run", resume=True)
    for file in ("model", "heads"):
        ours = load_file(tmp_path / "run" / f"{file}.safetensors")
        theirs = load_file(tmp_path / "whole" / f"{file}.safetensors")
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    times = ("tokens_per_second", "data_wait", "seconds")
    records = [
        [{k: v for k, v in r.items() if k not in times} for r in read_metrics(tmp_path / name)]
        for name in ("run", "whole")
    ]
    assert records[0] == records[1]
