"""``pipeline finetune`` as typed: fields by option, what is kept, what is not replaced."""

import json
import shlex

import pytest

from testlib.command import pipeline


@pytest.fixture
def typed(tmp_path, make_model, wordpiece):
    """The command on pairs whose fields have other names, one quick epoch."""
    rows = [
        {"premise": "a river", "claim": f"the {word}", "gold": word}
        for word in ("model", "paper") * 8
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = make_model("bert", "AutoModelForMaskedLM", wordpiece, initializer_range=0.1)
    given = ["finetune", model, "--train", path, "--dev", path, "--out", tmp_path / "out"]
    given += ["--text-field", "premise", "--text-field", "claim", "--label-field", "gold"]
    return [*map(str, given), "--set", "epochs=2", "--set", "learning_rate=1e-2"]


def test_fields_are_options_the_kept_epoch_is_told_and_a_result_is_replaced_by_force(typed):
    done = pipeline(*typed)
    assert done.returncode == 0, done.stderr
    score, kept, expert = done.stdout.splitlines()
    assert score.startswith("accuracy on ")
    assert kept.startswith("kept: epoch ")
    assert kept.endswith(" of 2, best on dev")
    assert expert.startswith("expert: ")
    following = done.stderr.partition("Next, with a FILE of yours:\n")[2].splitlines()
    asked = shlex.split(following[0].replace("FILE", typed[typed.index("--dev") + 1]))
    found = pipeline(*asked[1:])
    assert found.stdout.startswith(score), found.stderr
    assert "pairs: adjacent" in following[-1]
    again = pipeline(*typed)
    assert (again.returncode, again.stdout) == (2, "")
    told, _, line = again.stderr.splitlines()[-1].partition("--force to replace it: ")
    assert "holds an earlier result, which is left as it is" in told
    assert shlex.split(line) == ["pipeline", *typed, "--force"]
    whole = json.loads(pipeline(*shlex.split(line)[1:], "--json").stdout)
    assert whole["config"]["text_field"] == ["premise", "claim"]
    assert f"epoch {whole['kept_epoch']} of 2" in kept


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--set", "label_field=gold"], "--label-field and --set label_field=… set the same value"),
        (["--set", "label_column=gold"], "unknown key 'label_column'; it is called 'label_field'"),
        (["--text-field", "third"], "text_field"),
        (["--set", "epochs=0", "--seeds", "2"], "with epochs=0 nothing is trained: leave --seeds"),
        (["--set", "epochs=many"], "epochs: "),
    ],
)
def test_wrong_options_are_refused_before_any_work(typed, tmp_path, more, words):
    done = pipeline(*typed, *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
