"""Teachers with a tokenizer of their own, whose tokens are mapped by their bytes."""

import json

import numpy as np
import pytest
import torch
import transformers

from rekindle.data.cache import Cache
from rekindle.data.corpus.corpus import Corpus
from rekindle.data.corpus.tokenizer import load_tokenizer
from rekindle.data.errors import InputError
from rekindle.data.storage.manifest import read_manifest
from rekindle.data.storage.seal import VERSION, WITH_MAPPED
from rekindle.data.storage.store import LocalStore
from rekindle.data.tokens.token_bytes import bytes_of_tokens
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.mapped import VocabularyMap
from rekindle.pipeline.checks.audit import audit_cache
from rekindle.pipeline.checks.inspect import inspect_cache
from rekindle.pipeline.checks.verify import verify_cache
from rekindle.pipeline.train_student import train_from_config
from testlib.vocabularies.pieces import save_pieces

ODD = ["Café au lait — naïve façade, 東京 and 🙂🙃!", "tabs\tand\nlines,  two spaces", "ünder"]
LENGTH = 40


@pytest.fixture(scope="module")
def lines(corpus_file):
    return [json.loads(line)["text"] for line in corpus_file.read_text().splitlines()]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory, lines):
    return save_pieces(tmp_path_factory.mktemp("pieces"), [*lines[20:], *ODD[:1]], 440)


@pytest.fixture(scope="module")
def llama(make_model, pieces):
    return make_model("llama", "AutoModelForCausalLM", pieces, num_hidden_layers=1)


@pytest.fixture(scope="module")
def text(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    texts = [f"{odd} {line}" for odd, line in zip(ODD, lines, strict=False)] + lines[3:14]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(path, text, tokenizer, model, **teacher):
    return {
        "path": path,
        "teachers": [
            {
                "name": "far",
                "model": str(model),
                "task": "causal_lm",
                "vocabulary": "map",
                "targets": {"kind": "topk", "k": 8, "temperatures": [1.0, 2.0]},
                **teacher,
            }
        ],
        "corpus": {
            "source": [str(text)],
            "tokenizer": str(tokenizer),
            "domain_field": None,
            "sequence_length": LENGTH,
            "limit_sequences": None,
        },
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory, configure, text, bytelevel, llama, one_thread):
    path = tmp_path_factory.mktemp("mapped") / "cache"
    config = configure(**run(path, text, bytelevel, llama))
    cache_teachers(config)
    return config


def written(hf, ids):
    """What ids decode to, with the spaces that they stand for."""
    return hf.decode(ids, clean_up_tokenization_spaces=False, skip_special_tokens=True)


def meeting(hf, ids, text):
    """By the text before it: the number of each token that begins where a character does."""
    found = {}
    for number in range(len(ids)):
        before = written(hf, ids[:number])
        if "\ufffd" not in before and text.startswith(before):
            found[before] = number
    return found


def test_every_position_and_id_by_decoding_alone(made, bytelevel, llama):
    """Nothing of the map is asked: prefixes are decoded and compared, and so is each token."""
    cache = Cache.open(made.cache.path)
    theirs = transformers.AutoTokenizer.from_pretrained(str(llama))
    ours = load_tokenizer(str(bytelevel)).hf
    model = transformers.AutoModelForCausalLM.from_pretrained(str(llama)).eval()
    size = len(ours)
    # As they are written within a text: after another token, whose text is taken away again.
    lead_ours, lead_theirs = ours("a")["input_ids"], theirs("a")["input_ids"]
    own = {written(ours, [*lead_ours, i]): i for i in range(size) if i not in ours.all_special_ids}
    named = [written(theirs, [*lead_theirs, i]) for i in range(len(theirs))]
    special = {*theirs.all_special_ids}
    whole = kept = 0
    for index in range(len(cache)):
        example = cache.example(index)
        ids, text = [int(i) for i in example.input_ids], example.text
        end = len(ids) - (ids[-1] == ours.eos_token_id)
        (target,) = example.targets["far"]
        if text[0] == ODD[0][-3]:  # it begins within that character: prefixes say nothing
            continue
        shown = theirs(text)["input_ids"]
        there = meeting(theirs, shown, text)
        here = meeting(ours, ids[:end], text)
        # A first token has nothing before it here; BOS comes before the teacher's. Its own first
        # token has a space that the text has not: nothing begins there for both.
        both = {b: (n, there[b]) for b, n in here.items() if b in there and n > 0 and b}
        where = {int(at): row for row, at in enumerate(target.positions)}
        within = [at for at in where if written(ours, ids[: at + 1]).endswith("\ufffd")]
        assert [n - 1 for n, _ in sorted(both.values())] == sorted({*where} - {*within}), text
        whole, kept = whole + len(ids) - 1, kept + len(both)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([shown])).logits[0].double()
        for place, number in both.values():
            row = where[place - 1]
            probs = torch.softmax(logits[number - 1], dim=-1)
            by_id = {}
            for token, name in enumerate(named):
                if token not in special and "\ufffd" not in name and name in own:
                    by_id[own[name]] = float(probs[token])  # a piece, not its byte
            best = sorted(by_id, key=by_id.get, reverse=True)[:8]
            stored = target.ids[row].tolist()
            # What is a part of a character alone cannot be decoded.
            whole_ones = np.array([i in by_id for i in stored])
            assert all("\ufffd" in ours.decode([i]) for i in target.ids[row][~whole_ones])
            found = np.exp(target.log_probs[row])
            expected = np.where(whole_ones, [by_id.get(i, 0.0) for i in stored], found)
            np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-4)
            likely = [i for i, whole in zip(stored, whole_ones, strict=True) if whole]
            assert {*likely[:4]} <= {*best[:6]}
            tail = float(np.exp(target.log_tail[1.0][row]))
            assert abs(tail + expected.sum() - 1) < 2e-2
            assert target.gold_ids[row] == ids[place]
    assert 0.5 < kept / whole < 1


def test_what_is_kept_is_counted_and_shown(made):
    cache = Cache.open(made.cache.path)
    reader = cache.teacher("far")
    lengths = [len(cache.example(i).input_ids) - 1 for i in range(len(cache))]
    share, mass = reader.mapped_coverage
    assert share == reader.positions / sum(lengths)
    assert reader.coverage == 1  # no unit is missing
    assert reader.info.mapped > 100
    assert 0.3 < mass < 1
    assert "vocabulary: map" in inspect_cache(made.cache.path)
    assert read_manifest(cache.store)[VERSION] == WITH_MAPPED


def test_verify_and_audit_find_nothing_wrong(made):
    assert not verify_cache(made.cache.path).problems
    report = audit_cache(made.cache.path, made, 6, 0)
    assert not [line for one in report.teachers.values() for line in one.beyond]


def test_the_same_tokenizer_is_the_identity(tmp_path, configure, text, bytelevel, make_model):
    model = make_model("gpt2", "AutoModelForCausalLM", bytelevel, n_layer=1)
    caches = []
    for name in ("map", "same"):
        asked = run(tmp_path / name, text, bytelevel, model, vocabulary=name)
        asked["corpus"]["packing"] = "document"
        cache_teachers(configure(**asked))
        caches.append(Cache.open(tmp_path / name))
    hf, read = load_tokenizer(str(bytelevel)).hf, 0
    for index in range(len(caches[0])):
        examples = [cache.example(index) for cache in caches]
        content = [int(i) for i in examples[0].input_ids if i != hf.eos_token_id]
        if hf(examples[0].text)["input_ids"] != content:  # cut within a character
            continue
        read += 1
        (mapped,), (same,) = (example.targets["far"] for example in examples)
        text_there = np.isin(same.positions, mapped.positions)
        assert text_there.sum() == len(content) - 1  # all but the end of the text
        np.testing.assert_array_equal(mapped.ids, same.ids[text_there])
        np.testing.assert_allclose(mapped.log_probs, same.log_probs[text_there], atol=2e-3)
    assert read > len(caches[0]) / 2


def test_a_student_learns_from_it(tmp_path, made, bytelevel, make_model):
    student = make_model("gpt2", "AutoModelForCausalLM", bytelevel, n_layer=1)
    values = made.model_dump(mode="json", by_alias=True)
    values["student"] = {"model": str(student), "task": "causal_lm"}
    values["train"] = {
        "steps": 2,
        "batch_sequences": 4,
        "objective": {"distill": [{"teachers": ["far"]}]},
    }
    config = type(made).model_validate(values)
    train_from_config(config, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    kept, whole = summary["coverage"]["positions_with_kd"], summary["coverage"]["positions_ce_only"]
    assert kept > whole > 0


def test_dense_targets_are_of_the_common_tokens(tmp_path, configure, text, bytelevel, llama):
    asked = run(tmp_path / "cache", text, bytelevel, llama, targets={"kind": "dense"})
    cache_teachers(configure(**asked))
    cache = Cache.open(tmp_path / "cache")
    (target,) = cache.example(0).targets["far"]
    mass = np.exp(target.log_probs.astype(np.float64)).sum(axis=1)
    np.testing.assert_allclose(mass, 1, atol=1e-4)
    assert cache.teacher("far").mapped_coverage[1] < 1


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({"packing": "packed"}, "another tokenizer reads it as one text"),
        ({"map_coverage": 0.999}, "less than map_coverage"),
        ({"targets": {"kind": "threshold"}}, "kinds topk and dense"),
        ({"task": "masked_lm"}, "is for causal_lm"),
        ({"vocabulary": "same"}, "another tokenizer"),
    ],
)
def test_what_is_refused(tmp_path, configure, text, bytelevel, llama, teacher, told):
    corpus = {key: teacher[key] for key in teacher.keys() & {"packing"}}
    teacher = {key: value for key, value in teacher.items() if key not in corpus}
    asked = run(tmp_path / "cache", text, bytelevel, llama, **teacher)
    asked["corpus"] |= corpus
    with pytest.raises(InputError, match=told):
        cache_teachers(configure(**asked))


def test_a_tokenizer_that_changes_texts(wordpiece):
    with pytest.raises(InputError, match="are not known"):
        bytes_of_tokens(load_tokenizer(str(wordpiece)))


def test_real_text_with_the_tokenizer_of_gpt2(tmp_path, shared, configure):
    """Its boundaries and ids are those of the text, whatever the other tokenizer cuts."""
    gpt2 = shared / "tokenizers/gpt2"
    lines = (shared / "corpus/wiki_train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    texts = [json.loads(line)["text"][:1500] for line in lines]
    pieces = save_pieces(tmp_path / "pieces", texts, 3000)
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = configure(**{**run(tmp_path / "cache", source, gpt2, pieces), "teachers": []})
    cache_teachers(config)
    corpus = Corpus(LocalStore(tmp_path / "cache"))
    theirs = load_tokenizer(str(pieces))
    found = VocabularyMap.of(corpus, theirs, theirs.size)
    hf = corpus.tokenizer.hf
    for ours, other in enumerate(found.rows.tolist()):
        if other >= 0:
            piece = theirs.hf.convert_ids_to_tokens(other)
            one = hf.convert_tokens_to_string([hf.convert_ids_to_tokens(ours)])
            if not piece.startswith("<0x"):
                assert piece.replace("▁", " ") == one
    kept = whole = 0
    for shard in range(len(corpus.commits)):
        table = corpus.shard(shard).table()
        rows = found.map_rows(table, 2048)
        ids = table["input_ids"].to_pylist()
        for row, text in enumerate(table["text"].to_pylist()):
            shown = rows.shown_ids[row].tolist()
            for at, place in zip(
                rows.positions[row].tolist(), rows.token_indices[row].tolist(), strict=True
            ):
                before = theirs.hf.decode(shown[: place + 1], skip_special_tokens=True)
                assert text.startswith(before), (text, before)
                assert hf.decode(ids[row][: at + 1]) == before
            kept += len(rows.positions[row])
            whole += int(rows.expected[row])
    assert kept / whole > 0.6
