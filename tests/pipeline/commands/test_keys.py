"""Keys of a configuration on the command line: listed by --help, and answered where one is typed
as an option.
"""

import shlex
import subprocess
import sys

import pytest

from rekindle.data.settings import keys_called
from rekindle.pipeline.commands.keys import listed, settings_of
from rekindle.pipeline.overrides import set_value
from rekindle.train.answers.config import AskConfig, PerplexityConfig
from rekindle.train.finetune.config import FinetuneConfig
from testlib.command import pipeline


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("finetune m --epochs 5", "--set epochs=5"),
        ("finetune m --lr=1e-4 --out o", "--set learning_rate=1e-4"),
        ("finetune m --batch-size 8", "--set batch_size=8"),
        ("finetune m --epochs --out o", "--set epochs=VALUE"),
        ("finetune m --drop-labels '[a, b]'", "--set 'drop_labels=[a, b]'"),
        ("finetune m --drop-labels a b --out o", "--set 'drop_labels=[a, b]'"),
        ("finetune --betas 0.9 0.98 m --out o", "--set 'betas=[0.9, 0.98]'"),
        ("finetune m --betas=0.9,0.98", "--set 'betas=[0.9,0.98]'"),
        ("train-student r.yaml --betas 0.9 0.98", "--set 'train.betas=[0.9, 0.98]'"),
        ("finetune m --label-names no yes", "--set 'label_names=[no, yes]'"),
        ("train-student r.yaml --steps 5", "--set train.steps=5"),
        ("train-student r.yaml --bs 8", "--set train.batch_sequences=8"),
        ("cache-teachers r.yaml --replicas 3", "--set cache.replicas=3"),
        ("plan r.yaml --compile", "--set train.compile=true"),
        ("rekindle c.yaml --patience 5", "--set finetune.patience=5"),
        ("evaluate cl --test F --batch-size 5", "--set batch_size=5"),
        ("evaluate lm --text=F --tokens 9", "--set tokens=9"),
        ("predict cl --text F --out o --max-length 9", "--set max_length=9"),
        ("compare a b --test F --batch-size 9", "--set batch_size=9"),
    ],
)
def test_a_key_that_is_typed_as_an_option_is_answered_with_what_sets_it(
    typed, answer, capsys, command
):
    code, told = command(typed)
    assert code == 2
    assert told.endswith(f"Type: {answer}\n")
    values: dict[str, object] = {}
    set_value(values, shlex.split(answer)[1])
    if typed.startswith("finetune") and "VALUE" not in answer:
        FinetuneConfig.model_validate(values)


@pytest.mark.parametrize("typed", ["finetune m --seed 3", "finetune m --nonsense", "gc c --lr 1"])
def test_what_is_no_key_or_begins_an_option_is_left_to_the_option_parser(typed, command):
    code, told = command(typed)
    assert code == 2
    assert "No such option" in told
    assert "Type:" not in told


@pytest.fixture
def command(capsys, monkeypatch):
    """command(line) -> (exit code, stderr) of the command line, in this process."""
    from rekindle.pipeline import cli

    def run(line):
        monkeypatch.setattr(sys, "argv", ["pipeline", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("command", "beside", "settings"),
    [
        ("finetune", "", FinetuneConfig),
        ("predict", "--text", AskConfig),
        ("evaluate", "--test", AskConfig),
        ("evaluate", "--text", PerplexityConfig),
    ],
)
def test_help_names_every_key_with_a_default_that_set_takes(command, beside, settings):
    shown = pipeline(command, "--help").stdout
    values: dict[str, object] = {}
    for default, meaning in listed(command, [beside]):
        set_value(values, default)
        assert default in shown
        assert meaning.split()[0] in shown
    assert set(values) == set(settings.model_fields)
    assert settings.model_validate(values) == settings()


@pytest.mark.parametrize(
    ("command", "key"),
    [("finetune", "learning_rate"), ("evaluate", "batch_tokens"), ("predict", "threshold")],
)
def test_help_with_keys_imports_nothing_heavy(command, key):
    code = (
        f"import sys; sys.argv = ['pipeline', '{command}', '--help']\n"
        "from rekindle.pipeline import cli\n"
        "try:\n    cli.main()\n"
        "except SystemExit:\n"
        "    print({'torch', 'numpy', 'transformers'} & {*sys.modules}, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "set()\n"
    assert key in done.stdout


def test_other_names_of_keys_are_those_of_one_key_each():
    for name in ("lr", "wd", "bs", "num_epochs", "seq_len", "text_columns"):
        assert len(keys_called(settings_of("finetune"), name)) == 1
    assert keys_called(settings_of("train-student"), "lr") == ["train.learning_rate"]
