"""Every key of the corpus section with every kind of wrong value: one line and exit code 2."""

import pytest
import yaml

from rekindle.data.corpus.config import CorpusConfig
from testlib.command import pipeline

WRONG = ["", "~", "true", "3", "-1", "2.5", ".inf", "1e999", "[]", "{}", "[[a]]", "[~]", "{a: 1}"]
WRONG += ["no/such", "/", ".", "..", "a\\0b", "'a\\nb'", '"a\\0b"', '"\\ud800"', "'  '", "é" * 300]
WRONG += ["99999999999999999999", "[*", "{{a}}", "$NOWHERE", "~nobody-here", "s3://b/x", "a:b:c:d"]
GOOD = {  # what is right after all
    "attention": {"", "~"},
    "chat_template": {"", "~"},
    "domain_field": {"", "~"},
    "group_field": {"", "~"},
    "limit_sequences": {"", "~", "3"},
    "pair_field": {"", "~"},
    "without": {"", "~", "[]"},
    "without_fields": {"", "~", "[]"},
}


@pytest.fixture
def run_file(tmp_path, wordpiece, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "the river runs over the city"}\n' * 5)
    corpus = {"source": "a.jsonl", "tokenizer": str(wordpiece)}
    values = {"corpus": corpus, "cache": {"path": "cache"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize("key", sorted(CorpusConfig.model_fields))
def test_a_wrong_value_is_one_line_and_exit_code_2(run_file, key):
    for value in WRONG:
        done = pipeline("plan", run_file, "--no-probe", "--set", f"corpus.{key}={value}")
        good = value in GOOD.get(key, ())
        assert done.returncode == (0 if good else 2), (value, done)
        if not good:
            assert done.stderr.startswith("error: "), (value, done.stderr)
            assert done.stderr.count("\n") == 1, (value, done.stderr)
            assert done.stdout == ""
    assert not (run_file.parent / "cache").exists()
