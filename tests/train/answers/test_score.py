"""Scores without training: experts, a student's heads, and the table of merges, on a real task."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.pipeline.cli import app
from rekindle.train.answers.judge import StudentHead, open_judge
from rekindle.train.answers.score import (
    baselines_table,
    expert_output,
    names_for,
    score_model,
)
from rekindle.train.config import StudentConfig
from rekindle.train.finetune.config import MergeConfig
from rekindle.train.finetune.merge_baselines import scores_by_name
from rekindle.train.finetune.run import FinetuneConfig, finetune
from rekindle.train.finetune.task_data import TaskData, read_task
from rekindle.train.student import build_student
from testlib.answers.judges import LABELS, classifier, head
from testlib.models import STILL

QUICK = FinetuneConfig(epochs=0)


def logits_one_by_one(model, tokenizer, texts):
    """Of transformers alone, without padding."""
    found = []
    for text in texts:
        with torch.no_grad():
            found.append(model(**tokenizer(text, return_tensors="pt")))
    return found


def reference_accuracy(student, name, folder, task):
    """The head on the first token's state, labels without what stands before the slash."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "student"))
    rows = [json.loads(line) for line in Path(task).read_text().splitlines()]
    right = 0
    for row in rows:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            state = student.model.base_model(**inputs).last_hidden_state[0, 0]
            logits = student.heads[name](state)
        label = student.head_configs[name].label_names[int(logits.argmax())]
        right += label.split("/")[-1] == row["label"]
    return right / len(rows)


@pytest.mark.parametrize("name", ["a+b", "a+c"])
def test_a_students_head_is_scored_as_it_is(folder, student, task, tmp_path, name):
    before = sorted((p.name, p.read_bytes()) for p in (folder / "student").iterdir())
    config = FinetuneConfig(epochs=0, head=name, batch_size=7)
    result = score_model(str(folder / "student"), task, task, str(tmp_path / "s"), config=config)
    assert result.mean == pytest.approx(reference_accuracy(student, name, folder, task))
    assert 0 < result.mean < 1
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["metrics.json"]
    written = json.loads((tmp_path / "s/metrics.json").read_text())
    assert written["mean"] == result.mean
    assert sorted((p.name, p.read_bytes()) for p in (folder / "student").iterdir()) == before


def test_a_students_score_head_is_scored_on_scores(folder, student, tmp_path):
    texts = ["the old river", "a new city of light", "water runs under the mountain"]
    tokenizer = AutoTokenizer.from_pretrained(str(folder / "student"))
    own = []
    for text in texts:
        with torch.no_grad():
            states = student.model.base_model(**tokenizer(text, return_tensors="pt"))
            own.append(float(student.heads["score"](states.last_hidden_state[0, 0])[0]))
    path = tmp_path / "scores.jsonl"
    rows = [{"text": t, "label": -2.5 * s} for t, s in zip(texts, own, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = FinetuneConfig(epochs=0, head="score")
    given = (str(folder / "student"), str(path), str(path), str(tmp_path / "out"))
    assert score_model(*given, config=config).mean == pytest.approx(-1, abs=1e-4)


def test_which_head_must_be_clear(folder, student, task, tmp_path):
    given = (str(folder / "student"), task, task, str(tmp_path / "s"))
    with pytest.raises(InputError, match=r"has the task heads a\+b, a\+c, score; say which"):
        score_model(*given, config=QUICK)
    with pytest.raises(InputError, match="not 'b'"):
        score_model(*given, config=FinetuneConfig(epochs=0, head="b"))
    with pytest.raises(InputError, match="is a regression; the task has labels of another kind"):
        score_model(*given, config=FinetuneConfig(epochs=0, head="score"))
    assert not (tmp_path / "s").exists()


def reference_logits(directory, texts):
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    found = logits_one_by_one(model, AutoTokenizer.from_pretrained(directory), texts)
    return torch.cat([one.logits for one in found]).numpy()


def test_an_experts_output_is_its_own(experts, task):
    data = read_task(task)[0]
    found = expert_output("b", experts[1], data, 40, 0, 128, 8)
    np.testing.assert_allclose(found.logits, reference_logits(experts[1], data.texts), atol=2e-5)
    assert found.info.label_names == ("rain", "sun", "dog")
    np.testing.assert_allclose(found.mc_probs.sum(axis=1), 1, atol=1e-5)
    plain = np.exp(found.logits) / np.exp(found.logits).sum(axis=1, keepdims=True)
    assert 1e-3 < np.abs(found.mc_probs - plain).mean() < 0.2
    again = expert_output("b", experts[1], data, 40, 0, 128, 8)
    other = expert_output("b", experts[1], data, 40, 1, 128, 8)
    assert (again.mc_probs == found.mc_probs).all()
    assert (other.mc_probs != found.mc_probs).any()
    assert expert_output("b", experts[1], data, 0, 0, 128, 8).mc_probs is None


@pytest.mark.parametrize("passes", [1, 3])
def test_an_expert_without_dropout_has_no_uncertainty(make_model, wordpiece, task, passes):
    still = STILL
    model = classifier(make_model, wordpiece, 1, "dog", "cat", **still)
    data = read_task(task)[0]
    with pytest.raises(InputError, match=f"{passes} Monte-Carlo passes are identical"):
        expert_output("a", model, data, passes, 0, 128, 8)


WAYS = ["uniform mixture", "concatenated logits", "MUKI, soft", "MUKI, hard"]


def test_the_table_of_merges(folder, student, experts, task, tmp_path, make_model, wordpiece):
    """Of experts alone and mixed, against transformers' own logits."""
    oracle = classifier(make_model, wordpiece, 9, *LABELS)
    merge = MergeConfig(experts=experts, oracle=oracle, passes=4)
    config = FinetuneConfig(epochs=0, head="a+b", merge=merge)
    given = (str(folder / "student"), task, task, str(tmp_path / "s"))
    found = score_model(*given, config=config).baselines
    alone = [f"{Path(e).name} alone" for e in experts]
    assert list(found) == ["student, head a+b", *alone, *WAYS, "oracle"]
    data = read_task(task)[0]
    truth = [data.label_names[label] for label in data.labels]
    names = [("dog", "cat"), ("rain", "sun", "dog")]
    probs = [torch.softmax(torch.tensor(reference_logits(e, data.texts)), 1) for e in experts]
    for way, own, p in zip(alone, names, probs, strict=True):
        right = np.mean([own[i] == t for i, t in zip(p.argmax(1), truth, strict=True)])
        assert found[way]["accuracy"] == pytest.approx(right)
    mixed = []
    for row in range(len(truth)):
        q = dict.fromkeys(LABELS, 0.0)
        for own, p in zip(names, probs, strict=True):
            for label, value in zip(own, p[row].tolist(), strict=True):
                q[label] += value / 2
        mixed.append(max(q, key=q.get) == truth[row])
    assert found["uniform mixture"]["accuracy"] == pytest.approx(np.mean(mixed))
    assert found["student, head a+b"]["accuracy"] == pytest.approx(
        reference_accuracy(student, "a+b", folder, task)
    )
    table = baselines_table(found).splitlines()
    assert len(table) == 1 + len(found)
    assert table[0].split() == ["accuracy", "f1", "matthews"]
    assert table[-1].split()[:2] == ["oracle", f"{found['oracle']['accuracy']:.4f}"]


def test_without_a_student_the_model_is_the_first_expert(experts, task, tmp_path):
    merge = MergeConfig(experts=experts[1:], passes=0)
    config = FinetuneConfig(epochs=0, merge=merge)
    result = score_model(experts[0], task, task, str(tmp_path / "s"), config=config)
    assert list(result.baselines) == [f"{Path(e).name} alone" for e in experts] + WAYS[:2]
    assert result.mean == result.baselines[f"{Path(experts[0]).name} alone"]["accuracy"]


def test_dev_and_test_are_called_by_name_and_the_model_is_opened_once(
    experts, folder, task, tmp_path, monkeypatch, caplog
):
    opened = []

    def opening(*given):
        opened.append(given)
        return open_judge(*given)

    monkeypatch.setattr("rekindle.train.answers.score.open_judge", opening)
    student = str(folder / "student")
    for number, (model, merge) in enumerate(
        [(student, None), (experts[0], MergeConfig(experts=experts[1:], passes=0))]
    ):
        head = "a+b" if merge is None else None
        config = FinetuneConfig(epochs=0, head=head, max_length=4, merge=merge)
        given = (model, task, task, str(tmp_path / f"s{number}"))
        result = score_model(*given, test=task, config=config)
        (seed,) = result.per_seed
        assert seed.test_scores == seed.scores
        assert result.cut["test"] > 0
    assert len(opened) == 1  # one of the experts that are merged is asked among them
    told = [line for line in caplog.messages if " of test" in line or " of dev" in line]
    assert [line.partition(" of ")[2].partition(" ")[0] for line in told] == ["dev", "test"]


def test_names_of_experts_are_their_directories_and_differ():
    assert names_for(["runs/a", "runs/b.1"]) == ["a", "b.1"]
    assert names_for(["x/a", "y/a", "z/ä"]) == ["a", "expert-1", "expert-2"]


def test_an_expert_is_scored_by_itself_too(experts, task, folder, tmp_path):
    rows = [json.loads(line) for line in Path(task).read_text().splitlines()]
    known = [row for row in rows if row["label"] in ("cat", "dog")]
    path = tmp_path / "known.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in known))
    result = score_model(experts[0], str(path), str(path), str(tmp_path / "s"), config=QUICK)
    guesses = reference_logits(experts[0], [row["text"] for row in known]).argmax(axis=1)
    right = [("dog", "cat")[g] == row["label"] for g, row in zip(guesses, known, strict=True)]
    assert result.mean == pytest.approx(np.mean(right))
    with pytest.raises(InputError, match="the task has the labels"):
        score_model(experts[0], task, task, str(tmp_path / "t"), config=QUICK)
    given = (experts[0], str(path), str(path), str(tmp_path / "t"))
    with pytest.raises(InputError, match="head is for students"):
        score_model(*given, config=FinetuneConfig(epochs=0, head="a"))


def test_a_model_is_never_replaced_by_its_scores(experts, task, tmp_path):
    copy = Path(shutil.copytree(experts[0], tmp_path / "expert"))
    (copy / "metrics.json").write_text('{"written_by": "rekindle finetune"}')
    with pytest.raises(InputError, match="holds a model"):
        score_model(str(copy), task, task, str(copy), config=QUICK)
    assert (copy / "model.safetensors").exists()


def test_settings_of_scoring_are_refused_where_something_is_trained(experts, task, tmp_path):
    for config in (QUICK, FinetuneConfig(merge={"experts": ["a"]})):
        with pytest.raises(InputError, match="without training, with epochs: 0"):
            finetune(experts[0], task, task, str(tmp_path / "s"), config=config)


def test_the_command_prints_the_table(experts, task, tmp_path):
    given = ["finetune", experts[0], "--train", task, "--dev", task, "--out", str(tmp_path / "s")]
    given += ["--set", "epochs=0", "--set", f"merge.experts=[{experts[1]}]"]
    done = CliRunner().invoke(app, [*given, "--set", "merge.passes=2"])
    assert done.exit_code == 0, done.output
    assert "concatenated logits" in done.stdout
    assert "MUKI, hard" in done.stdout
    *_, score, where = done.stdout.splitlines()
    assert score.startswith(f"accuracy on {task}: 0.")
    assert where == f"scores: {tmp_path / 's'}"
    refused = CliRunner().invoke(app, given)
    assert isinstance(refused.exception, InputError)
    assert "holds an earlier result, which is left as it is" in str(refused.exception)
    again = CliRunner().invoke(app, [*given, "--json", "--force"])
    assert json.loads(again.stdout)["baselines"]["uniform mixture"]["accuracy"] >= 0
    many = CliRunner().invoke(app, [*given, "--seeds", "3"])
    assert isinstance(many.exception, InputError)


def test_a_domain_prompt_leaves_room_for_itself(make_model, wordpiece, task, tmp_path):
    """Texts that fill all the positions a model has are a token shorter beside a prompt."""
    tiny = make_model(
        "bert", "AutoModelForMaskedLM", wordpiece, 5, hidden_size=16, max_position_embeddings=8
    )
    heads = {"all": head(*LABELS)}
    config = StudentConfig(model=str(tiny), domain_prompts=True)
    made = build_student(config, heads, 100, 0, domains=["a", "b"])
    made.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(str(tiny)).save_pretrained(tmp_path / "student")
    result = score_model(
        str(tmp_path / "student"), task, task, str(tmp_path / "s"), config=FinetuneConfig(epochs=0)
    )
    assert 0 <= result.mean <= 1


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_segments_are_for_models_that_know_them(make_model, bytelevel, wordpiece, family):
    """GPT-2 adds the embedding of a word for each ``token_type_ids``, zeros too."""
    causal = family == "gpt2"
    tokenizer, auto = (bytelevel, "CausalLM") if causal else (wordpiece, "MaskedLM")
    model = make_model(family, f"AutoModelFor{auto}", tokenizer)
    config = StudentConfig(model=str(model), task="causal_lm" if causal else "masked_lm")
    student = build_student(config, {"all": head(*LABELS)}, 100, 0).eval()
    data = TaskData(["the river", "a city"], ["light falls", "old"], np.zeros(2, np.int64), LABELS)
    judge = StudentHead(student, str(model), "all")
    found = judge.logits(judge.read(data, 32), 2)
    for row, pair in enumerate(zip(data.texts, data.pairs, strict=True)):
        ids, types = load_tokenizer(str(model)).encode_pair(*pair, max_length=32)
        inputs = {"input_ids": torch.tensor(ids)[None].long()}
        inputs |= {} if causal else {"token_type_ids": torch.tensor(types)[None].long()}
        with torch.no_grad():
            states = student.model.base_model(**inputs).last_hidden_state[0]
            direct = student.heads["all"](states[-1 if causal else 0])
        np.testing.assert_allclose(found[row], direct.numpy(), atol=1e-4)


def test_a_folder_of_ones_own_may_be_called_as_the_built_in_ones(
    folder, student, task, tmp_path, monkeypatch
):
    (tmp_path / "python-docs").mkdir()
    shutil.copy(task, tmp_path / "python-docs" / "task.jsonl")
    monkeypatch.chdir(tmp_path)
    own = "./python-docs/task.jsonl"
    command = ["finetune", str(folder / "student"), "--train", own, "--dev", own, "--out", "s"]
    result = CliRunner().invoke(app, [*command, "--set", "epochs=0", "--set", "head=a+b"])
    assert result.exit_code == 0, result.output


def test_the_task_says_which_f1_there_is_whatever_labels_a_model_has(
    folder, student, experts, task, make_model, wordpiece
):
    """The experts together have four labels, the oracle those two that the task has."""
    rows = [json.loads(line) for line in Path(task).read_text().splitlines()]
    path = folder / "two.jsonl"
    two = [json.dumps(row) + "\n" for row in rows if row["label"] in ("cat", "dog")]
    path.write_text("".join(two))
    oracle = classifier(make_model, wordpiece, 9, "cat", "dog")
    for positive in (None, "cat"):
        merge = MergeConfig(experts=experts, oracle=oracle, passes=0)
        config = FinetuneConfig(epochs=0, head="a+b", merge=merge, positive=positive)
        given = (str(folder / "student"), str(path), str(path), str(folder / "two"))
        found = score_model(*given, config=config, force=True).baselines
        metrics = ["accuracy", *(["f1"] if positive else []), "matthews"]
        assert {way: [*scores] for way, scores in found.items()} == dict.fromkeys(found, metrics)
        assert baselines_table(found).split()[: len(metrics)] == metrics


def test_f1_is_that_of_the_positive_class_beside_labels_the_task_has_not():
    data = TaskData(["t"] * 4, None, np.array([0, 0, 1, 1]), ("a", "b"), positive="a")
    values = np.eye(3)[[0, 2, 0, 1]]  # a, c, a, b
    assert scores_by_name(values, ("a", "b", "c"), data)["f1"] == pytest.approx(1 / 2)
