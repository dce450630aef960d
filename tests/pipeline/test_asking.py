"""`pipeline evaluate` and `pipeline predict` as they are typed: what they print, and exit codes."""

import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout

import pytest

from testlib.answers.judges import LABELS, classifier, lines, write
from testlib.command import pipeline, run_main

TEXTS = ["the river", "a city", "light falls", "old water"]


@pytest.fixture(scope="module")
def expert(make_model, wordpiece):
    return classifier(make_model, wordpiece, 2, *LABELS)


@pytest.fixture(scope="module")
def model(make_model, wordpiece):
    return str(make_model("bert", "AutoModelForMaskedLM", wordpiece, 3))


@pytest.fixture
def rows(tmp_path):
    each = zip(TEXTS, LABELS, strict=True)
    return write(tmp_path / "rows.jsonl", [{"question": t, "kind": label} for t, label in each])


def test_scores_are_printed_and_predictions_written_on_request(tmp_path, expert, rows):
    named, out = ("--text-field", "question", "--label-field", "kind"), tmp_path / "said.jsonl"
    done = pipeline("evaluate", expert, "--test", rows, *named, "--metric", "f1", "--out", out)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first.startswith(f"macro f1 on {rows}: 0.")
    assert last == f"predictions: {out}"
    assert [[*one] for one in lines(out)] == [["question", "kind", "label", "probabilities"]] * 4
    assert "classification: 4 rows, 4 classes: cat 1" in done.stderr
    assert "no text is cut" in done.stderr
    found = json.loads(pipeline("evaluate", expert, "--test", rows, *named, "--json").stdout)
    assert found["value"] == found["scores"]["accuracy"]
    assert found["label_names"] == [*LABELS]
    again = pipeline("evaluate", expert, "--test", rows, *named, "--out", out)
    assert (again.returncode, "or --force to replace it" in again.stderr) == (2, True)


def test_a_language_model_is_measured_on_text(tmp_path, model, expert, rows):
    given = ("evaluate", model, "--text", rows, "--text-field", "question")
    done = pipeline(*given, "--set", "tokens=5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pseudo-perplexity on {rows}: ")
    assert "per token of its tokenizer (95 %: " in done.stdout
    assert "at most 5 tokens, drawn uniformly with seed 0" in done.stderr
    found = json.loads(pipeline(*given, "--set", "tokens=all", "--json").stdout)
    assert found["tokens"] == found["tokens_in_all"]
    typo = pipeline(*given, "--set", "token=5")
    assert (typo.returncode, "did you mean 'tokens'" in typo.stderr) == (2, True)
    wrong = pipeline("evaluate", expert, "--text", rows, "--text-field", "question")
    command = wrong.stderr.partition("predictions on texts: `pipeline ")[2].partition("`")[0]
    assert wrong.returncode == 2
    advised = [
        part.replace("predictions.jsonl", str(tmp_path / "p.jsonl")) for part in command.split()
    ]
    assert pipeline(*advised, "--text-field", "question").returncode == 0


def test_a_language_model_knows_no_labels(tmp_path, model, rows):
    asked = (
        ["evaluate", model, "--test", rows, "--label-field", "kind"],
        ["predict", model, "--text", rows],
    )
    for given in asked:
        out = ["--out", tmp_path / "o.jsonl"] if given[0] == "predict" else []
        done = pipeline(*given, "--text-field", "question", *out)
        assert done.returncode == 2
        assert f"`pipeline finetune {model} --train" in done.stderr
        assert not (tmp_path / "o.jsonl").exists()


def test_predictions_are_written_and_summed_up(tmp_path, expert, rows):
    out = tmp_path / "deep" / "said.jsonl"
    done = pipeline("predict", expert, "--text", rows, "--text-field", "question", "--out", out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4 rows: ")
    assert len(lines(out)) == 4
    again = pipeline("predict", expert, "--text", rows, "--text-field", "question", "--out", out)
    assert again.returncode == 2
    given = ("predict", expert, "--text", rows, "--text-field", "question", "--out", out)
    found = json.loads(pipeline(*given, "--force", "--json").stdout)
    assert (found["rows"], found["label_names"]) == (4, [*LABELS])
    wrong = pipeline("predict", expert, "--text", rows, "--out", "-", "--json")
    assert (wrong.returncode, "would both write to stdout" in wrong.stderr) == (2, True)


def test_in_a_pipe_rows_come_in_and_lines_go_out(expert):
    """Whoever reads may have enough before the end."""
    rows = "".join(json.dumps({"text": text, "é": "\x7f"}) + "\n" for text in TEXTS)
    out = io.TextIOWrapper(io.BytesIO())
    with piped_in(rows), redirect_stdout(out), pytest.raises(SystemExit) as left:
        run_main("predict", expert, "--text", "-", "--out", "-")
    assert not left.value.code
    out.flush()
    printed = out.buffer.getvalue()
    said = [json.loads(line) for line in io.BytesIO(printed)]
    assert [one["text"] for one in said] == TEXTS
    assert [one["é"] for one in said] == ["\x7f"] * 4
    assert printed.isascii()


@pytest.mark.slow
def test_in_a_shells_pipe_whoever_reads_may_have_enough_before_the_end(expert, tmp_path):
    """As `| head -1` does: more rows than a pipe holds, and no complaint of a broken one."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 3000)
    given = tmp_path / "rows.jsonl"
    given.write_text(rows)
    command = [sys.executable, "-m", "rekindle.pipeline.cli", "predict", expert]
    with given.open("rb") as stdin:
        process = subprocess.Popen(
            [*command, "--text", "-", "--out", "-"],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
    assert json.loads(process.stdout.readline())["text"] == TEXTS[0]
    process.stdout.close()
    errors = process.stderr.read().decode()
    assert process.wait(300) == 0, errors
    assert "error" not in errors.lower()
    assert "Traceback" not in errors


@contextmanager
def piped_in(text):
    """A shell's pipe in place of this process's stdin."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    before = os.dup(0)
    os.dup2(reading, 0)
    os.close(reading)
    try:
        yield
    finally:
        os.dup2(before, 0)
        os.close(before)


def test_nothing_trained_points_to_evaluate(tmp_path, expert, rows):
    given = ("finetune", expert, "--train", rows, "--dev", rows, "--out", tmp_path / "s")
    named = ("--set", "text_field=question", "--set", "label_field=kind")
    named += ("--metric", "f1", "--set", "epochs=0", "--set", "drop_labels=[sun]")
    done = pipeline(*given, *named)
    assert done.returncode == 0, done.stderr
    line = done.stderr.partition("without --train: pipeline ")[2].partition("\n")[0]
    assert line.startswith(f"evaluate {expert} --test {rows} ")
    again = pipeline(*shlex.split(line))
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, done.stdout.splitlines()[0])
