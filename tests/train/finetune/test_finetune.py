import errno
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.settings import parse_settings
from rekindle.pipeline.teacher_config import TeacherConfig
from rekindle.train.answers.score import evaluate
from rekindle.train.finetune import run as module
from rekindle.train.finetune.config import FinetuneConfig, learning_rate_factor, plan_steps
from rekindle.train.finetune.encoded import EncodedTexts, collate, encode, epoch_batches
from rekindle.train.finetune.result import EarlierResult
from rekindle.train.finetune.run import finetune
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.optimizer import adamw

FILLER = ["the", "a", "of", "in", "to", "and", "model", "teacher", "paper", "light"]
QUICK = FinetuneConfig(epochs=6, batch_size=16, learning_rate=1e-2)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def words(draw, *needed):
    text = [*draw.choice(FILLER, size=draw.integers(1, 7)), *needed]
    return " ".join(draw.permutation(text))


def single(draw):
    """The class is which of three words occurs."""
    name = str(draw.choice(["river", "engine", "gradient"]))
    return {"text": words(draw, name), "label": f"about {name}"}


def pair(draw):
    """1 where the second sentence is about water; the first one speaks of water by chance."""
    label = int(draw.integers(2))
    first = words(draw, draw.choice(["water", "city"]))
    return {"sentence1": first, "sentence2": words(draw, ["city", "water"][label]), "label": label}


def score(draw):
    """How often a word occurs, from 0.5."""
    count = int(draw.integers(4))
    return {"text": words(draw, *["mountain"] * count), "label": count + 0.5}


def task(folder, row, sizes=(320, 60)):
    draw = np.random.default_rng(0)
    names = ("train", "dev", "test")
    return [
        write(folder / f"{name}.jsonl", [row(draw) for _ in range(size)])
        for name, size in zip(names, sizes, strict=False)
    ]


@pytest.fixture
def bert(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1))


@pytest.fixture
def gpt2(make_model, bytelevel):
    path = make_model("gpt2", "AutoModelForCausalLM", bytelevel, initializer_range=0.1)
    config = json.loads((path / "config.json").read_text()) | {"pad_token_id": None}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def written_predictions(out):
    return [json.loads(line) for line in (Path(out) / "predictions.jsonl").read_text().splitlines()]


def reloaded_logits(out, rows):
    """One example at a time through transformers alone: no padding, none of our code."""
    model = AutoModelForSequenceClassification.from_pretrained(out).eval()
    tokenizer = AutoTokenizer.from_pretrained(out)
    logits = []
    for row in rows:
        texts = [row["text"]] if "text" in row else [row["sentence1"], row["sentence2"]]
        inputs = tokenizer(*texts, return_tensors="pt")
        inputs.pop("token_type_ids", None) if model.config.model_type == "gpt2" else None
        with torch.no_grad():
            logits.append(model(**inputs).logits[0].numpy())
    return np.stack(logits)


@pytest.mark.parametrize(
    ("family", "row"), [("bert", single), ("bert", pair), ("gpt2", single), ("bert", score)]
)
def test_it_learns_and_the_saved_expert_gives_the_written_predictions(
    tmp_path, request, family, row
):
    train, dev = task(tmp_path, row)
    out = str(tmp_path / "expert")
    result = finetune(request.getfixturevalue(family), train, dev, out, config=QUICK)
    assert result.mean > (0.7 if row is score else 0.9)
    rows = [json.loads(line) for line in Path(dev).read_text().splitlines()]
    written = written_predictions(out)
    logits = reloaded_logits(out, rows)
    config = AutoConfig.from_pretrained(out)
    assert config.problem_type == result.problem
    if row is score:
        assert result.metric == "pearson"
        for own, one, line in zip(rows, logits, written, strict=True):
            assert line == own | {"score": pytest.approx(float(one[0]), abs=2e-5)}
    else:
        probs = torch.softmax(torch.from_numpy(logits), dim=1).tolist()
        for own, one, line in zip(rows, probs, written, strict=True):
            each = {config.id2label[i]: pytest.approx(p, abs=1e-5) for i, p in enumerate(one)}
            said = {"label": config.id2label[int(np.argmax(one))], "probabilities": each}
            given = {"given_label": own["label"]}
            assert line == {k: v for k, v in own.items() if k != "label"} | given | said
    scores, again = evaluate(out, read_task(train, dev)[1])
    assert scores == pytest.approx(result.per_seed[0].scores, abs=1e-6)
    np.testing.assert_allclose(again, logits, atol=2e-5)  # other batches, other rounding
    check_card(out, result)


def check_card(out, result):
    """The hub's block, a program that runs, a teacher's section that is read, the scores."""
    card = (Path(out) / "README.md").read_text()
    block, _, text = card.partition("---\n\n")
    assert yaml.safe_load(block.removeprefix("---\n"))["pipeline_tag"] == "text-classification"
    assert f"{result.mean:.4f}" in text
    assert all(f"`{name}`" in text for name in result.label_names)
    told = {}
    exec(text.partition("```python\n")[2].partition("```")[0], told)
    assert told["judge"].model.config.problem_type == result.problem
    [teacher] = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])["teachers"]
    read = parse_settings(TeacherConfig, teacher)
    assert read.model == out
    assert (read.task == "regression") == (result.problem == "regression")


def test_seeds_are_summarised_and_the_best_on_dev_is_kept(tmp_path, bert):
    train, dev, test = task(tmp_path, single, (64, 60, 30))
    out = tmp_path / "deep" / "expert"
    config = FinetuneConfig(max_steps=14, epochs=9, batch_size=16, learning_rate=1e-2)
    result = finetune(
        bert, train, dev, str(out), seeds=3, first_seed=5, metric="f1", config=config, test=test
    )
    scores = [seed.scores["f1"] for seed in result.per_seed]
    assert [seed.seed for seed in result.per_seed] == [5, 6, 7]
    assert len(set(scores)) > 1
    assert result.mean == pytest.approx(np.mean(scores))
    assert result.std == pytest.approx(np.std(scores, ddof=1))
    assert result.best_seed == 5 + int(np.argmax(scores))
    splits = read_task(train, dev, test)
    best = result.per_seed[result.best_seed - 5]
    assert evaluate(str(out), splits[1])[0] == best.scores
    assert evaluate(str(out), splits[2])[0] == best.test_scores
    assert result.test_mean == pytest.approx(
        np.mean([seed.test_scores["f1"] for seed in result.per_seed])
    )
    saved = json.loads((out / "metrics.json").read_text())
    assert saved == json.loads(json.dumps(result.as_dict()))
    assert saved["files"] == {"train": train, "dev": dev, "test": test}
    assert [epoch["steps"] for epoch in saved["per_seed"][0]["epochs"]] == [4, 8, 12, 14]
    assert [entry.name for entry in out.parent.iterdir()] == ["expert"]


def test_a_seed_gives_the_same_bits_again_and_another_does_not(tmp_path, bert):
    train, dev = task(tmp_path, single, (64, 20))
    config = FinetuneConfig(epochs=2, batch_size=16)
    states = []
    for run, seed in enumerate((3, 3, 4)):
        torch.rand(run + 1)  # whatever was drawn before must not matter
        before = torch.random.get_rng_state()
        out = tmp_path / f"run{run}"
        finetune(bert, train, dev, str(out), first_seed=seed, config=config)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(load_file(out / "model.safetensors"))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_the_last_epoch_is_kept_unless_patience_is_set(tmp_path, bert, monkeypatch):
    train, dev = task(tmp_path, single, (32, 20))
    falling = iter([0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.9])
    real = module.scores_of
    monkeypatch.setattr(
        module, "scores_of", lambda *given: real(*given) | {"accuracy": next(falling)}
    )
    kept = []
    predict = module.predict

    def spy(model, *rest):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return predict(model, *rest)

    monkeypatch.setattr(module, "predict", spy)
    config = FinetuneConfig(epochs=9, batch_size=16, patience=2)
    result = finetune(bert, train, dev, str(tmp_path / "out"), config=config)
    assert [epoch["scores"]["accuracy"] for epoch in result.per_seed[0].epochs] == [
        0.5, 0.9, 0.8, 0.7,
    ]  # fmt: skip
    assert result.mean == 0.9
    assert (
        result.kept_model == "epoch 2 of 9, best on dev; ended after 4: 2 in a row were no better"
    )
    assert (result.kept_epoch, result.per_seed[0].stopped) == (2, "patience")
    assert len(kept) == 4  # what was scored once is not scored again
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(saved[name], kept[1][name]) for name in saved)

    kept.clear()
    falling = iter([0.9, 0.8, 0.7])
    last = FinetuneConfig(epochs=3, batch_size=16, patience=None)
    told = finetune(bert, train, dev, str(tmp_path / "last"), config=last)
    assert told.kept_model == "epoch 3 of 3, the last"
    saved = load_file(tmp_path / "last" / "model.safetensors")
    assert len(kept) == 3
    assert all(torch.equal(saved[name], kept[2][name]) for name in saved)


@pytest.mark.parametrize(("limit", "scored"), [({"epochs": 5}, [3, 5]), ({"max_steps": 8}, [3, 4])])
def test_the_model_is_the_same_however_often_dev_is_scored(tmp_path, bert, limit, scored):
    train, dev = task(tmp_path, single, (32, 20))
    results = []
    for every in (1, 3):
        config = FinetuneConfig(
            **{"epochs": 9} | limit, batch_size=16, patience=None, evaluate_every=every
        )
        out = tmp_path / f"every-{every}"
        results.append(finetune(bert, train, dev, str(out), test=dev, config=config))
    both = [tmp_path / f"every-{every}" for every in (1, 3)]
    for name in ("model.safetensors", "predictions.jsonl"):
        assert both[0].joinpath(name).read_bytes() == both[1].joinpath(name).read_bytes()
    whole, some = (one.per_seed[0] for one in results)
    assert (some.scores, some.test_scores) == (whole.scores, whole.test_scores)
    assert (some.kept_epoch, some.stopped) == (whole.kept_epoch, whole.stopped)
    expected = [one if one["epoch"] in scored else one | {"scores": None} for one in whole.epochs]
    assert some.epochs == expected
    assert results[1].kept_model == results[0].kept_model


def test_a_dev_that_is_not_scored_after_each_epoch_chooses_none():
    with pytest.raises(ValueError, match=r"patience \(auto\) chooses .* set patience to null"):
        FinetuneConfig(evaluate_every=2)


# ---- what is written, and what is left alone -----------------------------------------------------


def test_an_earlier_result_is_replaced_by_force_and_anything_else_is_left_alone(tmp_path, bert):
    train, dev = task(tmp_path, single, (32, 20))
    out = tmp_path / "out"
    out.mkdir()  # an empty directory may be filled
    config = FinetuneConfig(max_steps=1)
    finetune(bert, train, dev, str(out), config=config)
    (out / "stale").touch()
    with pytest.raises(EarlierResult, match="holds an earlier result, which is left as it is"):
        finetune(bert, train, dev, str(out), first_seed=1, config=config)
    assert (out / "stale").exists()
    finetune(bert, train, dev, str(out), first_seed=1, config=config, force=True)
    assert json.loads((out / "metrics.json").read_text())["best_seed"] == 1
    assert not (out / "stale").exists()
    for foreign in ("{}", "[]", "not json", '{"written_by": "another"}'):
        (out / "metrics.json").write_text(foreign)
        with pytest.raises(InputError, match="not a result of this command"):
            finetune(bert, train, dev, str(out), config=config, force=True)
        assert (out / "metrics.json").read_text() == foreign
    with pytest.raises(InputError, match="exists"):
        finetune(bert, train, dev, train, config=config, force=True)


@pytest.mark.parametrize("existed", [False, True])
def test_an_interruption_leaves_nothing_half_written(tmp_path, bert, monkeypatch, existed):
    train, dev = task(tmp_path, single, (32, 20))
    home = tmp_path / "home"
    out, config = home / "out", FinetuneConfig(max_steps=1)
    if existed:
        finetune(bert, train, dev, str(out), first_seed=7, config=config)
    save = module._save_model

    def interrupted(*given):
        save(*given)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_save_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        finetune(bert, train, dev, str(out), seeds=2, config=config, force=True)
    assert [entry.name for entry in home.iterdir()] == (["out"] if existed else [])
    if existed:
        assert json.loads((out / "metrics.json").read_text())["best_seed"] == 7
        AutoModelForSequenceClassification.from_pretrained(out)


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("predict", MemoryError(), r"^out of memory .*batch_size \(now 16\) or max_length \(now "),
        ("collate", torch.OutOfMemoryError("CUDA out of memory"), r"--set batch_size=8"),
        ("write_predictions", OSError(errno.ENOSPC, "No space left on device"), r"No space left"),
        ("write_predictions", SafetensorError("… (os error 28)"), r"out cannot be written"),
    ],
)
def test_what_runs_out_is_told_and_leaves_what_was_there(
    tmp_path, bert, monkeypatch, where, error, words
):
    train, dev = task(tmp_path, single, (32, 20))
    home = tmp_path / "home"
    out, config = home / "out", FinetuneConfig(max_steps=1)
    finetune(bert, train, dev, str(out), first_seed=7, config=config)

    def fail(*given, **options):
        raise error

    monkeypatch.setattr(module, where, fail)
    with pytest.raises(InputError, match=words):
        finetune(bert, train, dev, str(out), config=config, force=True)
    assert [entry.name for entry in home.iterdir()] == ["out"]
    assert json.loads((out / "metrics.json").read_text())["best_seed"] == 7


def test_the_tokenizer_is_saved_without_this_runs_cut(tmp_path, bert):
    train, dev = task(tmp_path, single, (32, 20))
    out = str(tmp_path / "out")
    finetune(bert, train, dev, out, config=FinetuneConfig(max_steps=1, max_length=5))
    assert load_tokenizer(out).digest == load_tokenizer(bert).digest
    assert len(AutoTokenizer.from_pretrained(out)("river " * 20)["input_ids"]) == 22


def test_a_directory_with_more_files_is_just_a_model(tmp_path, bert):
    train, dev = task(tmp_path, single, (32, 20))
    student = tmp_path / "student"
    shutil.copytree(bert, student)
    save_file({"task.weight": torch.ones(2, 2)}, student / "heads.safetensors")
    finetune(str(student), train, dev, str(tmp_path / "out"), config=FinetuneConfig(max_steps=1))
    assert not (tmp_path / "out" / "heads.safetensors").exists()


def test_it_says_one_line_per_epoch_and_nothing_on_stderr(tmp_path, bert, caplog, capfd):
    train, dev = task(tmp_path, single, (32, 20))
    with caplog.at_level("INFO", logger="rekindle"):
        finetune(bert, train, dev, str(tmp_path / "out"), config=FinetuneConfig(epochs=2))
    lines = [record.getMessage() for record in caplog.records if "loss" in record.getMessage()]
    assert len(lines) == 2
    assert lines[1].startswith("seed 0  epoch 2/2  loss ")
    assert capfd.readouterr() == ("", "")


# ---- heads and bodies ----------------------------------------------------------------------------


def relabelled(model, names):
    """The head's weights as ``finetune`` starts with them for these labels, under seed 0."""
    data = TaskData(["a"], None, np.zeros(1, np.int64), names)
    torch.manual_seed(0)
    return module.load_classifier(model, load_tokenizer(model).hf, data).state_dict()


def test_a_head_is_reused_only_for_the_same_labels(tmp_path, bert):
    train, dev = task(tmp_path, single, (32, 20))
    out = str(tmp_path / "out")
    result = finetune(bert, train, dev, out, config=FinetuneConfig(max_steps=1))
    saved = load_file(f"{out}/model.safetensors")
    same = relabelled(out, result.label_names)
    assert all(torch.equal(saved[name], same[name]) for name in saved)
    for names in (("x", "y", "z"), ("x", "y"), result.label_names[::-1], ()):
        other = relabelled(out, names)
        assert not torch.equal(saved["classifier.weight"], other["classifier.weight"])
        assert len(other["classifier.weight"]) == max(1, len(names))
        body = [name for name in saved if name.startswith("bert.")]
        assert all(torch.equal(saved[name], other[name]) for name in body)


def test_a_body_that_lacks_weights_is_refused_by_name(tmp_path, bert):
    files = task(tmp_path, single, (32, 20))
    broken = tmp_path / "broken"
    shutil.copytree(bert, broken)
    weights = load_file(broken / "model.safetensors")
    gone = "bert.encoder.layer.1.output.dense.weight"
    del weights[gone]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 weight of the bert body: {gone}"):
        finetune(str(broken), *files, str(tmp_path / "out"), config=QUICK)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 50}))
    with pytest.raises(InputError, match=r"intermediate\.dense\.weight"):
        finetune(str(broken), *files, str(tmp_path / "out"), config=QUICK)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_loaded_are_input_errors(tmp_path, bert):
    files = task(tmp_path, single, (32, 20))
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="no such directory"):
        finetune(str(tmp_path / "none"), *files, out, config=QUICK)
    pickled = tmp_path / "pickled"
    shutil.copytree(bert, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        finetune(str(pickled), *files, out, config=QUICK)
    (pickled / "model.safetensors").write_bytes(b"0123456789abcdef")
    with pytest.raises(InputError, match="damaged"):
        finetune(str(pickled), *files, out, config=QUICK)


def test_evaluate_matches_classes_by_name(tmp_path, bert):
    train, dev = task(tmp_path, single)
    out = str(tmp_path / "out")
    finetune(bert, train, dev, out, config=QUICK)
    rows = [json.loads(line) for line in Path(dev).read_text().splitlines()]
    two = [row for row in rows if row["label"] != "about engine"]
    (subset,) = read_task(write(tmp_path / "two.jsonl", two))
    assert subset.label_names == ("about gradient", "about river")
    assert evaluate(out, subset)[0]["accuracy"] > 0.9
    with pytest.raises(InputError, match="the task has the labels x, y"):
        evaluate(out, TaskData(["a", "b"], None, np.array([0, 1]), ("x", "y")))
    with pytest.raises(InputError, match="scores, not classes; the 3 outputs"):
        evaluate(out, TaskData(["a"], None, np.array([0.5], np.float32), ()))


def test_evaluate_wants_a_trained_head(tmp_path, make_model, wordpiece):
    names = {"id2label": {0: "x", 1: "y"}, "label2id": {"x": 0, "y": 1}}
    data = TaskData(["a", "b"], None, np.array([0, 1]), ("x", "y"))
    body = make_model("bert", "AutoModel", wordpiece, **names)
    with pytest.raises(InputError, match=r"no trained classification head.*classifier\.weight"):
        evaluate(str(body), data)
    language_model = make_model("bert", "AutoModelForMaskedLM", wordpiece, **names)
    with pytest.raises(InputError, match="is a masked language model without a trained head"):
        evaluate(str(language_model), data)


@pytest.mark.parametrize("family", ["roberta", "electra", "deberta", "modernbert", "llama"])
def test_every_family_runs_at_its_longest_input(tmp_path, make_model, wordpiece, bytelevel, family):
    causal = family == "llama"
    tokenizer, auto = (
        (bytelevel, "AutoModelForCausalLM") if causal else (wordpiece, "AutoModelForMaskedLM")
    )
    model = str(make_model(family, auto, tokenizer))
    draw = np.random.default_rng(0)
    rows = [single(draw) for _ in range(8)] + [single(draw) | {"text": "river " * 400}]
    path = write(tmp_path / "a.jsonl", [*rows, single(draw) | {"text": ""}])
    out = str(tmp_path / "out")
    config = FinetuneConfig(max_steps=1, max_length=1000, learning_rate=1e-5)
    result = finetune(model, path, path, out, config=config)
    assert evaluate(out, read_task(path)[0], max_length=1000)[0] == result.per_seed[0].scores


# ---- refusals ------------------------------------------------------------------------------------


def test_wrong_calls_are_refused_before_any_work(tmp_path, bert):
    train, dev = task(tmp_path, single, (32, 20))
    out = str(tmp_path / "out")
    with pytest.raises(InputError, match="accuracy, f1, matthews"):
        finetune(bert, train, dev, out, metric="pearson", config=QUICK)
    with pytest.raises(InputError, match="at least 1"):
        finetune(bert, train, dev, out, seeds=0, config=QUICK)
    with pytest.raises(ValueError, match="warmup"):
        FinetuneConfig(warmup=1.0)
    assert not Path(out).exists()


def test_a_diverged_run_says_so(tmp_path, bert):
    train, dev = task(tmp_path, score, (32, 20))
    config = FinetuneConfig(epochs=8, batch_size=4, learning_rate=1e20, warmup=0)
    with pytest.raises(InputError, match="diverged; lower the learning_rate"):
        finetune(bert, train, dev, str(tmp_path / "out"), config=config)


# ---- pure parts ----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=700),
    st.integers(1, 20),
    st.integers(0, 2**40),
    st.integers(0, 9),
)
def test_an_epoch_holds_every_row_once(lengths, batch_size, seed, epoch):
    lengths = np.array(lengths)
    batches = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    assert len(batches) == -(-len(lengths) // batch_size)
    assert sum(len(batch) != batch_size for batch in batches) <= 1
    again = epoch_batches(lengths, batch_size, seed=seed, epoch=epoch)
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ_and_batches_are_of_like_length():
    lengths = np.random.default_rng(0).integers(5, 120, size=4000)
    orders = {
        tuple(np.concatenate(epoch_batches(lengths, 32, seed=seed, epoch=epoch)))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9
    batches = epoch_batches(lengths, 32, seed=0, epoch=0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.1 * lengths.sum()
    first = [lengths[batch].mean() for batch in batches]
    assert abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.3  # no march from short to long


@given(st.integers(1, 500), st.integers(1, 40), st.integers(1, 5), st.floats(0, 0.99))
def test_the_schedule_rises_to_the_peak_once_and_falls_to_zero(examples, batch, epochs, fraction):
    config = FinetuneConfig(epochs=epochs, batch_size=batch, warmup=fraction)
    total, warmup = plan_steps(examples, config)
    assert total == epochs * -(-examples // batch)
    factors = [learning_rate_factor(step, total, warmup, "linear") for step in range(total)]
    assert max(factors) == 1.0
    assert min(factors) > 0
    assert np.all(np.diff(factors[:warmup]) > 0)
    assert np.all(np.diff(factors[warmup:]) < 0)
    assert factors[-1] == (1.0 if warmup == total else pytest.approx(1 / (total - warmup)))
    held = [learning_rate_factor(step, total, warmup, "constant") for step in range(total)]
    assert set(held[warmup:]) <= {1.0}


def test_max_steps_bounds_the_plan():
    assert plan_steps(100, FinetuneConfig(max_steps=5, warmup=0.2)) == (5, 1)
    assert plan_steps(100, FinetuneConfig(epochs=3, max_steps=500)) == (21, 3)


def test_biases_and_norms_do_not_decay(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert)
    config = FinetuneConfig()
    optimizer = adamw(model.parameters(), config.learning_rate, config.weight_decay)
    decayed, plain = optimizer.param_groups
    names = {id(weight): name for name, weight in model.named_parameters()}
    assert plain["weight_decay"] == 0.0
    assert decayed["weight_decay"] == 0.01
    for weight in plain["params"]:
        assert names[id(weight)].endswith("bias") or "LayerNorm" in names[id(weight)]
    assert not any("LayerNorm" in names[id(weight)] for weight in decayed["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


def test_pairs_texts_and_special_names_are_encoded_as_stage_one_does(wordpiece, bert):
    tokenizer = load_tokenizer(str(wordpiece))
    first, second = ["the river [SEP] runs", "a"], ["water " * 9, "light"]
    lengths = list(product(range(1, 13), repeat=2))
    first += ["water " * length for length, _ in lengths]
    second += ["river " * length for _, length in lengths]
    data = TaskData(first, second, np.zeros(len(first), np.int64), ("x", "y"))
    encoded = encode(tokenizer.hf, AutoConfig.from_pretrained(bert), data, 11)
    for row, (a, b) in enumerate(zip(first, second, strict=True)):
        ids, segments = tokenizer.encode_pair(a, b, 11)
        assert encoded.input_ids[row] == ids.tolist()
        assert encoded.token_type_ids[row] == segments.tolist()


def test_a_token_that_the_model_has_no_row_for_is_named(wordpiece, bert):
    tokenizer, config = load_tokenizer(str(wordpiece)), AutoConfig.from_pretrained(bert)
    data = TaskData(["the river"], None, np.zeros(1, np.int64), ("x", "y"))
    largest = max(encode(tokenizer.hf, config, data, 11).input_ids[0])
    config.vocab_size = largest
    told = rf"gives id {largest} \('\S+'\), but the model's embedding has {largest} rows"
    with pytest.raises(InputError, match=told):
        encode(tokenizer.hf, config, data, 11)
    config.vocab_size = largest + 1
    encode(tokenizer.hf, config, data, 11)


def test_batches_are_padded_on_the_right():
    encoded = EncodedTexts([[5, 6, 7], [1], [8, 8]], [[0, 1, 1], [0], [0, 0]], padding_id=9)
    batch = collate(encoded, [2, 0], torch.device("cpu"))
    batch = {name: tensor.tolist() for name, tensor in batch.items()}
    assert batch == {
        "input_ids": [[8, 8, 9], [5, 6, 7]],
        "attention_mask": [[1, 1, 0], [1, 1, 1]],
        "token_type_ids": [[0, 0, 0], [0, 1, 1]],
    }
