"""Corpora of dialogues: what the chat template writes; what the assistant says is trained."""

import pickle
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from rekindle.data.corpus.config import CorpusConfig
from rekindle.data.corpus.corpus import Corpus, build_corpus
from rekindle.data.corpus.in_order import in_threads
from rekindle.data.corpus.remarks import remarks
from rekindle.data.errors import CacheMismatchError, InputError
from rekindle.data.marks import read_trained
from rekindle.data.storage.manifest import begin_manifest, read_manifest
from rekindle.data.storage.store import LocalStore
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.masking import MaskConfig
from testlib.vocabularies.changed import that_begins_only
from testlib.vocabularies.dialogues import (
    DIALOGUES,
    MARKED,
    PLAIN,
    RAISING,
    REWRITING,
    chat_tokenizer,
    said,
    write_rows,
)

WHOLE = [number for number in range(len(DIALOGUES)) if number != 5]  # 5 has no answer


@pytest.fixture(scope="module")
def folders(tmp_path_factory, bytelevel, wordpiece):
    """Tokenizers: byte-level, of words, and one that puts <s> before a text, as its template."""
    path = tmp_path_factory.mktemp("chat")
    bos = that_begins_only(bytelevel, path / "llama")
    return {
        "gpt2": chat_tokenizer(bytelevel, path / "gpt2", MARKED),
        "bert": chat_tokenizer(wordpiece, path / "bert", MARKED),
        "bos": chat_tokenizer(bos, path / "bos", "{{ bos_token }}" + MARKED),
    }


@pytest.fixture
def build(tmp_path, folders):
    def made(cache="cache", tokenizer="gpt2", dialogues=DIALOGUES, template=None, **values):
        stop, in_order, done = values.pop("stop", None), values.pop("in_order", in_threads), []
        if isinstance(dialogues, list):
            dialogues = write_rows(tmp_path / "chat.jsonl", dialogues)
        given = {"source": str(dialogues), "format": "chat", "tokenizer": str(folders[tokenizer])}
        if template is not None:
            (tmp_path / "template.jinja").write_text(template)
            given["chat_template"] = str(tmp_path / "template.jinja")

        def progress(sequences, tokens):
            done.append(sequences)
            if len(done) == stop:
                raise KeyboardInterrupt

        config = CorpusConfig(**given | {"sequence_length": 256} | values)
        return build_corpus(LocalStore(tmp_path / cache), config, 2, progress, in_order=in_order)

    return made


def rows(corpus):
    return [row for n in range(len(corpus.commits)) for row in corpus.shard(n).table().to_pylist()]


def learnt(corpus):
    """What is trained of each sequence, in words."""
    decode = corpus.tokenizer.hf.decode
    each = [zip(row["input_ids"], row["trained"], strict=True) for row in rows(corpus)]
    return [decode([number for number, trained in row if trained]) for row in each]


def truth(folder, dialogue):
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        dialogue["messages"],
        tools=dialogue.get("tools"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )


@pytest.mark.parametrize("tokenizer", ["gpt2", "bert", "bos"])
def test_ids_and_what_is_trained_are_what_transformers_makes_of_the_template(
    build, folders, tokenizer
):
    corpus = build(tokenizer=tokenizer, special_tokens="token")
    found = rows(corpus)
    assert len(found) == len(WHOLE)
    for row, number in zip(found, WHOLE, strict=True):
        expected = truth(folders[tokenizer], DIALOGUES[number])
        assert row["input_ids"] == expected["input_ids"], number
        assert row["trained"] == [bool(one) for one in expected["assistant_masks"]], number
    assert corpus.trained_tokens == sum(sum(row["trained"]) for row in found) > 0


@pytest.mark.parametrize("tokenizer", ["gpt2", "bert"])
def test_names_of_special_tokens_in_messages_are_text(build, folders, tokenizer):
    corpus = build(tokenizer=tokenizer)
    hf = AutoTokenizer.from_pretrained(folders[tokenizer])
    for row, number in zip(rows(corpus), WHOLE, strict=True):
        names = ("<|im_start|>", "<|im_end|>")
        each = [row["input_ids"].count(hf.convert_tokens_to_ids(name)) for name in names]
        turns = len(DIALOGUES[number]["messages"]) + ("tools" in DIALOGUES[number])
        assert each == [turns, turns]
        assert all(
            (start < 0) == (token in corpus.tokenizer.special_ids - {hf.unk_token_id})
            for start, token in zip(row["char_starts"], row["input_ids"], strict=True)
        )
    assert rows(corpus)[WHOLE.index(4)]["text"].count("<|im_end|>") == 4
    alike = [number for number in WHOLE if number != 4]
    for number in alike:
        expected = truth(folders[tokenizer], DIALOGUES[number])["input_ids"]
        assert rows(corpus)[WHOLE.index(number)]["input_ids"] == expected


def test_without_marks_it_is_the_difference_of_prefixes(build):
    """By hand: from the prompt for the assistant to the end of its message."""
    expected = [
        "runs under a river<|im_end|>\n",
        "light<|im_end|>\nengine falls<|im_end|>\n",
        "a small model 🦊é<|im_end|>\nlearns<|im_end|>\n",
        "the large one<|im_end|>\n",
        "no <|im_end|>, no<|im_end|>\n",
        "quick engine " * 20 + "<|im_end|>\n",
    ]
    found = build(template=PLAIN)
    assert learnt(found) == expected
    assert found.tokenizer.hf.chat_template == PLAIN  # it is kept beside the corpus


def test_the_end_of_long_dialogues_is_cut_and_what_has_nothing_to_learn_is_left_out(build, folders):
    length, dialogues = 40, [*DIALOGUES, {"messages": said("u: " + "old city " * 30, "a: no")}]
    corpus = build(dialogues=dialogues, sequence_length=length, special_tokens="token")
    expected, lost, cut, untrained = [], 0, 0, 0
    for dialogue in dialogues:
        whole = truth(folders["gpt2"], dialogue)
        ids, trained = whole["input_ids"][:length], whole["assistant_masks"][:length]
        if any(trained):
            expected.append((ids, [bool(one) for one in trained]))
            lost += len(whole["input_ids"]) - len(ids)
            cut += len(whole["input_ids"]) > length
        untrained += not any(trained)
    assert [(row["input_ids"], row["trained"]) for row in rows(corpus)] == expected
    assert (cut, untrained) == (3, 3)
    share = corpus.trained_tokens / corpus.tokens
    assert remarks(corpus)[:3] == [
        f"trained: {corpus.trained_tokens} tokens, {share:.1%} of all",
        f"left out, with no trained token: {untrained} sequences",
        f"longer than sequence_length, the end cut: {cut} dialogues (or rows of tokens), "
        f"{lost} tokens lost",
    ]


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_an_interruption_changes_nothing(build, packing):
    dialogues = [*DIALOGUES, DIALOGUES[5]] * 2 + DIALOGUES[:1]
    more = {
        "dialogues": dialogues,
        "packing": packing,
        "sequence_length": 40 if packing == "document" else 16,
    }
    whole = build(**more)
    with pytest.raises(KeyboardInterrupt):
        build("again", stop=2, **more)
    again = build("again", **more)
    assert again.fingerprint == whole.fingerprint
    assert remarks(again) == remarks(whole)
    assert whole.commits_by_unit.count_facts("untrained_sequences").sum() > 0


def sent(load, parts):
    """Every part made elsewhere: what goes there and what comes back is pickled."""
    do = pickle.loads(pickle.dumps(load))()
    return (pickle.loads(pickle.dumps(do(pickle.loads(pickle.dumps(part))))) for part in parts)


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_other_processes_make_the_same(build, tmp_path, packing):
    rows_of_ids = [{"input_ids": [*range(5, 60)], "loss_mask": [0] * 10 + [1] * 45}]
    tokens = write_rows(tmp_path / "tokens.jsonl", rows_of_ids)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the old river"}])
    chat = write_rows(tmp_path / "a.jsonl", DIALOGUES)
    of_format = {"chat": chat, "tokens": tokens, "text": texts}
    source = [{"path": str(path), "format": name} for name, path in of_format.items()]
    here = build(source=source, packing=packing, sequence_length=32)
    there = build("there", source=source, packing=packing, sequence_length=32, in_order=sent)
    assert there.fingerprint == here.fingerprint
    assert len({row["document"].partition(":")[0] for row in rows(here)}) > 1


@pytest.mark.parametrize("packing", ["document", "contiguous"])
def test_no_sequence_begins_twice(build, packing):
    """The template writes <s>, and the tokenizer puts it before every text."""
    corpus = build(tokenizer="bos", packing=packing, sequence_length=64)
    bos = corpus.tokenizer.hf.bos_token_id
    for row in rows(corpus):
        assert row["input_ids"][0] == bos
        assert row["input_ids"].count(bos) == 1


def test_joined_dialogues_are_trained_where_each_of_them_is(build, folders):
    corpus = build(packing="contiguous", sequence_length=48, special_tokens="token")
    ids = np.concatenate([row["input_ids"] for row in rows(corpus)])
    trained = np.concatenate([row["trained"] for row in rows(corpus)])
    end, expected = corpus.tokenizer.eos_id, []
    for dialogue in DIALOGUES:
        whole = truth(folders["gpt2"], dialogue)
        expected += [*zip(whole["input_ids"], map(bool, whole["assistant_masks"]), strict=True)]
        expected.append((end, False))
    # Some sequences had nothing to learn, so that they are missing; and so is a leading end.
    found = [*zip(ids.tolist(), trained.tolist(), strict=True)]
    assert [number for number, is_trained in found if is_trained] == [
        number for number, is_trained in expected if is_trained
    ]
    assert all(row["trained"].count(True) for row in rows(corpus))
    assert not any(is_trained for number, is_trained in found if number == end)


def test_text_among_dialogues_is_as_it_is_alone(build, tmp_path, corpus_file):
    chat = write_rows(tmp_path / "a.jsonl", DIALOGUES)
    mixed = [{"path": str(chat), "format": "chat"}, str(corpus_file)]
    corpus = build(format="text", source=mixed, tokenizer="bos", sequence_length=32)
    alone = build(
        "alone", source=str(corpus_file), format="text", tokenizer="bos", sequence_length=32
    )
    own = [row for row in rows(corpus) if row["document"].startswith("d")]
    assert all(all(row.pop("trained")) for row in own)
    assert own == rows(alone)
    assert len(own) < len(corpus)
    assert "trained" not in rows(alone)[0]


def test_tables_lack_what_they_have_as_null(build, tmp_path, folders):
    call = {"role": "assistant", "content": "the river", "tool_calls": [{"name": "x"}]}
    messages = [[*said("u: which?"), call], said("u: old", "a: new")]
    pq.write_table(pa.table({"messages": messages}), tmp_path / "chat.parquet")
    # A template that looks whether a key is there, as most do for calls of tools.
    template = MARKED.replace(
        "m['content'] +", "('calls' if 'tool_calls' in m else '') + m['content'] +"
    )
    corpus = build(dialogues=tmp_path / "chat.parquet", template=template)
    assert learnt(corpus) == ["callsthe river<|im_end|>", "new<|im_end|>"]


def test_the_day_is_the_same_every_day(build):
    template = "{{ strftime_now('%d %b %Y') }}" + MARKED
    corpus = build(template=template, dialogues=DIALOGUES[:1])
    assert rows(corpus)[0]["text"].startswith("26 Jul 2024<|im_start|>")


BAD = [
    ({"text": "a"}, "no field 'messages'; it has: text"),
    ({"conversations": []}, "rename conversations, with role and content"),
    ({"messages": []}, "messages must be a list"),
    ({"messages": [{"content": "a"}]}, "message 1 is .* each has a role"),
    ({"messages": "no"}, "messages is text but not JSON"),
    ({"messages": said("u: a", "a: b"), "tools": "[1]"}, "tools must be a list of their JSON"),
    ({"messages": [{"role": "user", "content": {}}]}, "the chat template raises"),
    ({"messages": [{"role": "user", "name": "a"}]}, "message 1 of 'user' has no content"),
    ({"messages": [{"role": "user", "content": 5}]}, "message 1 has 5 .* must be text"),
    ({"messages": [{"role": "user", "ocntent": "a"}]}, "no content; did you mean 'ocntent'"),
    ({"messages": said("u: \U00100000", "a: b")}, "private planes"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_record_that_is_no_dialogue_is_named_or_left_out(build, row, message):
    with pytest.raises(InputError, match=rf"chat\.jsonl, record 2: .*{message}"):
        build(dialogues=[DIALOGUES[0], row])
    corpus = build(dialogues=[DIALOGUES[0], row], on_bad_record="skip")
    assert len(corpus) == sum(corpus.bad_records.values()) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (RAISING, r"record 2: the chat template raises: .*no system messages"),
        (REWRITING, r"record 1: .*rewrites earlier turns.*\{% generation %\}"),
    ],
)
def test_a_template_that_cannot_say_is_refused(build, template, message):
    with pytest.raises(InputError, match=message):
        build(template=template)


def test_dialogues_that_hold_a_text_of_a_test_are_left_out(build, tmp_path):
    tests = write_rows(tmp_path / "test.jsonl", [{"text": "which city?"}])
    corpus = build(without=[str(tests)])
    assert len(corpus) == len(WHOLE) - 1
    assert sum(corpus.held) == 1


def test_a_source_without_anything_to_learn_is_refused(build):
    with pytest.raises(InputError, match=r"some token is trained: what the role .assistant."):
        build(dialogues=DIALOGUES[5:6])


def test_what_is_no_corpus_of_dialogues_is_refused(build, tmp_path, bytelevel, corpus_file):
    given = {"source": str(corpus_file), "format": "chat", "tokenizer": str(bytelevel)}
    with pytest.raises(InputError, match=r"no chat template.*corpus\.chat_template: FILE"):
        build_corpus(LocalStore(tmp_path / "none"), CorpusConfig(**given), 2)
    for wrong, message in (
        ({"pair_field": "b"}, "pair_field is for records of two texts"),
        ({"format": "tokens", "without": ["a"]}, "rows of the format tokens have none"),
        ({"format": "text", "chat_template": "a"}, "no part of the source is one"),
        ({"source": [{"path": "a", "form": "chat"}]}, "form"),
    ):
        with pytest.raises(ValueError, match=message):
            CorpusConfig(**{"source": "a", "format": "chat", "tokenizer": "t"} | wrong)
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"a\.txt cannot hold rows of the format chat"):
        build(source=str(tmp_path / "a.txt"))
    twice = [{"path": str(corpus_file), "format": "chat"}, str(corpus_file)]
    with pytest.raises(InputError, match="is named twice, once with format chat"):
        build(source=twice, format="text")


def test_another_template_or_format_is_another_corpus(build, tmp_path):
    build(dialogues=DIALOGUES[:3])
    with pytest.raises(CacheMismatchError, match="chat_template"):
        build(dialogues=DIALOGUES[:3], template=PLAIN)
    with pytest.raises(CacheMismatchError, match=r"chat\.jsonl \(has other content\)"):
        build(dialogues=DIALOGUES[:3], format="text")


def test_it_grows_by_further_files_of_any_format(build, tmp_path):
    first = {"path": str(write_rows(tmp_path / "1.jsonl", DIALOGUES)), "format": "chat"}
    second = str(write_rows(tmp_path / "2.jsonl", [{"text": "the old river"}]))
    third = {"path": str(write_rows(tmp_path / "3.jsonl", DIALOGUES[::-1])), "format": "chat"}
    build(source=[first], format="text")
    grown = build(source=[first, second, third], format="text")
    whole = build("whole", source=[first, second, third], format="text")
    assert [row["digest"] for row in rows(grown)] == [row["digest"] for row in rows(whole)]
    assert grown.commits_by_unit.count_facts("untrained_sequences").sum() == 2
    assert len(Corpus(LocalStore(tmp_path / "cache")).additions) == 2


def test_only_caches_of_dialogues_have_the_new_version(build, tmp_path, corpus_file):
    for name, format, version in (("chat", "chat", 6), ("text", "text", 3)):
        begin_manifest(LocalStore(tmp_path / name))
        build(name, format=format, **({"source": str(corpus_file)} if format == "text" else {}))
        assert read_manifest(LocalStore(tmp_path / name))["format_version"] == version


@pytest.mark.parametrize(
    "mask", [MaskConfig(probability=0.9), MaskConfig(policy="cover", unit="word")]
)
def test_masks_choose_only_what_is_trained(build, mask):
    corpus = build(tokenizer="bert")
    view = MaskedView(corpus, mask, 0, 2)
    table, masked = rows(corpus), 0
    for replica in range(2):
        places = (view.masked_positions(n, replica) for n in range(len(corpus.commits)))
        for row, at in zip(table, chain.from_iterable(places), strict=True):
            assert all(row["trained"][place] and row["char_starts"][place] >= 0 for place in at)
            masked += len(at)
    content = sum(
        trained and start >= 0
        for row in table
        for trained, start in zip(row["trained"], row["char_starts"], strict=True)
    )
    assert masked >= 0.8 * content * (1 if mask.policy == "cover" else 2)


def test_a_batch_says_what_is_trained_in_any_order(build):
    corpus = build()
    each, order = rows(corpus), [4, 0, 5, 2]
    places = [(number // 2, number % 2) for number in order]
    found = read_trained(corpus, places)
    for row, number in zip(found, order, strict=True):
        trained = each[number]["trained"]
        assert row[: len(trained)].tolist() == trained
        assert not row[len(trained) :].any()


def test_packed_dialogues_are_those_of_documents_in_rows(build):
    alone, packed = rows(build("alone")), build("packed", packing="packed", sequence_length=300)
    whole = {name: [x for row in alone for x in row[name]] for name in ("input_ids", "trained")}
    table = rows(packed)
    assert len(table) < len(alone)
    for name, expected in whole.items():
        assert [x for row in table for x in row[name]] == expected
    assert sum(len(row["document_starts"]) for row in table) == len(alone)
    left_out = [
        c.commits_by_unit.count_facts("untrained_sequences").sum() for c in (packed, build("alone"))
    ]
    assert left_out[0] == left_out[1]
