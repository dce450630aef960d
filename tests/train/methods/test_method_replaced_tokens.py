"""Replaced-token detection: the loss, what is refused, and what a run leaves behind."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rekindle.data.cache import Cache
from rekindle.data.errors import InputError
from rekindle.train.config import StudentConfig
from rekindle.train.device_batch import split_batch
from rekindle.train.distributed import World
from rekindle.train.loop import train_student
from rekindle.train.measures import GRADIENT
from rekindle.train.methods.replaced_tokens import ReplacedTokenHead
from rekindle.train.prepare import prepare, prepare_objective
from rekindle.train.record.run_log import read_metrics
from rekindle.train.student import Student
from testlib.models import NARROW, STILL
from testlib.replaced_tokens import (
    CPU,
    RTD,
    config_of,
    gather,
    method_of,
    replacements,
    rtd_student,
)
from testlib.students import gradients, metrics, same_gradients, same_weights


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
        teachers = self.objective.plan(0).teachers
        found = self.cache.gather(np.asarray(index), teachers, masked_view=self.view)
        return self.objective.select_targets(found, self.objective.plan(0))

    def run(self, parts, counts):
        self.student.zero_grad(set_to_none=True)
        loss, terms = 0.0, {}
        for part in parts:
            result = self.objective.loss(self.student, part, counts, self.objective.plan(0), CPU)
            result.total.backward()
            loss += float(result.total.detach())
            for name, value in result.terms.items():
                terms[name] = terms.get(name, 0.0) + float(value)
        return loss, terms, gradients(self.student)

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
    return make_model("electra", "AutoModelForMaskedLM", wordpiece, 3, **NARROW, **STILL)


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
    counts = setting.objective.counts(batch, setting.objective.plan(0))
    whole = setting.run([batch], counts)
    setting.student.zero_grad(set_to_none=True)
    expected, bare = setting.reference(index, hard, term.get("weight", 50.0))
    expected.backward()
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert whole[1]["replaced_tokens/loss"] == pytest.approx(bare, rel=1e-5)
    assert ("ce" in whole[1]) == (hard > 0)
    same_gradients(whole[2], gradients(setting.student))
    heads = [n for n in whole[2] if "method:" in n or "discriminator" in n]
    assert len(heads) == 4
    for size in (1, 2, 4):  # micro-batches
        split = setting.run(split_batch(batch, size), counts)
        assert split[0] == pytest.approx(whole[0], rel=1e-5)
        same_gradients(split[2], whole[2])
    apart = [setting.batch(index[rank::2]) for rank in range(2)]  # processes
    counted = [setting.objective.counts(part, setting.objective.plan(0)) for part in apart]
    assert (
        sum(c.rows["replaced_tokens/loss"] for c in counted) == counts.rows["replaced_tokens/loss"]
    )
    same_gradients(setting.run(apart, counts)[2], whole[2])


def test_a_batch_without_any_target_has_a_loss_of_nothing(kinds, student):
    """The pass is made all the same: other processes may have rows."""
    setting = Setting(kinds, student, [RTD | {"teacher": "odd"}], 0.0)
    domains = setting.batch(range(24)).domains
    even = [i for i, domain in enumerate(domains) if domain == "even"][:2]
    batch = setting.batch(even)
    loss, terms, found = setting.run(
        [batch], setting.objective.counts(batch, setting.objective.plan(0))
    )
    nothing = {"replaced_tokens/loss": 0.0, f"{GRADIENT}replaced_tokens/loss": 0.0}
    assert (loss, terms) == (0.0, nothing)
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
    assert objective.plan(0).weights == (1.0, 50.0)
    assert objective.plan(0).teachers == ("lm",)
    falling = {"schedule": "step", "from": 50, "to": 0, "over": 0.5}
    later = objective_of(experts_world.path, "masked_lm", [RTD | {"weight": falling}])
    assert later.plan(499).teachers == ("lm",)
    assert later.plan(500).teachers == ()


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
    from rekindle.train.order.held_out import split_corpus

    index = split_corpus(cache, 0.2).held_out.spread(256)
    with torch.no_grad():
        _, logits, y = method._classify(trained, gather(cache, method, index), CPU)
    called = logits > 0
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
    batch = gather(cache, method, [1, 4, 5])
    text = method.corrupted(batch, CPU)
    trained = Student.from_pretrained(out).eval()
    with torch.no_grad():
        _, ours, _ = method._classify(trained, batch, CPU)
        theirs = model.eval()(**text.inputs).logits.flatten()[text.classified]
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


def test_only_trained_tokens_are_judged(kinds):
    """Of a corpus that says which they are."""
    cache, method = method_of(kinds, "topk")
    batch = gather(cache, method, [1, 4, 5])
    trained = np.random.default_rng(0).random(batch.input_ids.shape) < 0.5
    every = method.corrupted(batch, CPU).classified.numpy()
    found = method.corrupted(replace(batch, trained=trained), CPU).classified.numpy()
    assert found.tolist() == [place for place in every if trained.flat[place]]
    assert 0 < len(found) < len(every)


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
    assert same_weights(tmp_path / "run", tmp_path / "whole")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
