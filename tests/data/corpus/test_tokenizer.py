import json
import pickle
import shutil
import unicodedata
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import BertTokenizerFast, GPT2TokenizerFast, PreTrainedTokenizerFast

from rekindle.data.corpus.tokenizer import load_tokenizer, wrap_tokenizer
from rekindle.data.corpus.tokenizer_files import has_tokenizer_files
from rekindle.data.errors import InputError
from testlib.command import python
from testlib.corpora import SHARED

TOKENIZERS = SHARED / "tokenizers"
SENTENCE = "the cat sat on the mat and then another cat walked past them slowly one two three"
WORDS = SENTENCE.split()
CORPUS = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [
    "Héllo  world, don't 😀🧑‍🚀 x\nnew ﬁne 東京 e\u0301nd",
    "the cats\n\n  sat \t on\r\nmats.\u3000ok\u00a0so",
    "",
    " ",
    "the [MASK] cat <|endoftext|> </s> [SEP]",
]


def bert(**options):
    pieces = sorted({*WORDS, *"abcdefghijklmnopqrstuvwxyz.,'[]<>|/é東京"})
    pieces += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces]
    return BertTokenizerFast(vocab={token: i for i, token in enumerate(vocabulary)}, **options)


def trained(model, trainer, pre_tokenizer, normalizer=None):
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizer
    if normalizer:
        backend.normalizer = normalizer
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def gpt2():
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=alphabet,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    backend = trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return GPT2TokenizerFast(vocab=model["vocab"], merges=merges)


def llama(legacy):
    """SentencePiece BPE with byte fallback; the whole text is one word to it."""
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        show_progress=False,
    )
    model = models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    backend = trained(model, trainer, pre_tokenizers.Metaspace(prepend_scheme="first"))
    state = json.loads(backend.to_str())
    marks = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    state["pre_tokenizer"] = None if legacy else marks
    if legacy:
        state["normalizer"] = json.loads(
            normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
            .__getstate__()
            .decode()
        )
    for token in state["added_tokens"]:
        token["special"] = token["content"] in ("<unk>", "<s>", "</s>")
    state["added_tokens"] = [t for t in state["added_tokens"] if t["special"]]
    backend = Backend.from_str(json.dumps(state))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def unigram():
    """XLM-R's kind: SentencePiece unigram, split at the marks, <s> and </s> around a text."""
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        unk_token="<unk>",
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
    )
    backend = trained(
        models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizer=normalizers.NFKC()
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


MAKERS = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": lambda: llama(legacy=False),
    "llama-legacy": lambda: llama(legacy=True),
    "unigram": unigram,
}


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: wrap_tokenizer(make(), kind) for kind, make in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def tokenizer(request, tokenizers):
    return tokenizers[request.param]


@pytest.fixture(scope="module")
def published():
    if not TOKENIZERS.is_dir():
        pytest.skip(f"the published vocabularies are not here: {TOKENIZERS}")
    return {name: load_tokenizer(str(TOKENIZERS / name)) for name in ("bert-base-uncased", "gpt2")}


def words_of(text, encoded):
    """The text cut before every token that starts a word, without white space."""
    cuts = [*encoded.starts[encoded.word_starts], len(text)]
    return [text[a:b].strip() for a, b in pairwise(cuts) if text[a:b].strip()]


# --- facts ----------------------------------------------------------------------------------------


def test_what_stands_around_one_text(tokenizers):
    facts = {kind: (t.prefix, t.suffix, t.mask_id, t.eos_id) for kind, t in tokenizers.items()}
    eos = tokenizers["gpt2"].hf.convert_tokens_to_ids("<|endoftext|>")
    assert facts == {
        "bert": ((2,), (3,), 4, None),
        "gpt2": ((), (), None, eos),
        "llama": ((1,), (), None, 2),
        "llama-legacy": ((1,), (), None, 2),
        "unigram": ((1,), (2,), None, 2),
    }


def test_size_padding_and_special_ids(tokenizers):
    for tokenizer in tokenizers.values():
        assert tokenizer.size == len(tokenizer.hf)
        assert tokenizer.pad_id == 0
    assert tokenizers["bert"].special_ids == {0, 1, 2, 3, 4}
    assert tokenizers["llama"].special_ids == {0, 1, 2}
    assert tokenizers["gpt2"].special_ids == {tokenizers["gpt2"].eos_id}


def test_a_special_token_that_was_only_added_is_special():
    hf = bert()
    hf.add_tokens([AddedToken("<ctl>", special=True), "ordinary"])
    tokenizer = wrap_tokenizer(hf, "t")
    assert hf.convert_tokens_to_ids("<ctl>") in tokenizer.special_ids
    assert hf.convert_tokens_to_ids("ordinary") not in tokenizer.special_ids
    assert tokenizer.size == wrap_tokenizer(bert(), "t").size + 2


def test_digest_is_the_vocabulary_s():
    hf = bert()
    assert wrap_tokenizer(hf, "a").digest == wrap_tokenizer(bert(do_lower_case=False), "b").digest
    assert len(wrap_tokenizer(hf, "a").digest) == 64
    before = wrap_tokenizer(hf, "a").digest
    hf.add_tokens(["ordinary"])
    assert wrap_tokenizer(hf, "a").digest != before
    vocabulary = dict(bert().get_vocab())
    vocabulary["cat"], vocabulary["mat"] = vocabulary["mat"], vocabulary["cat"]
    assert wrap_tokenizer(BertTokenizerFast(vocab=vocabulary), "c").digest != before


# --- encoding -------------------------------------------------------------------------------------


def test_shapes_and_types(tokenizer):
    for text, encoded in zip(TEXTS, tokenizer.encode(TEXTS), strict=True):
        expected = tokenizer.hf(text, add_special_tokens=False, split_special_tokens=True)
        assert encoded.ids.tolist() == expected["input_ids"]
        assert [a.dtype for a in encoded] == [np.int32, np.int32, np.int32, np.bool_]
        assert {len(a) for a in encoded} == {len(encoded.ids)}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_spans_lie_in_the_text_and_never_go_back(tokenizer, text):
    (encoded,) = tokenizer.encode([text])
    assert (encoded.starts >= 0).all()
    assert (encoded.starts <= encoded.ends).all()
    assert (encoded.ends <= len(text)).all()
    assert (np.diff(encoded.starts) >= 0).all()
    assert (np.diff(encoded.ends) >= 0).all()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                [*WORDS, "catmat", "東京", "é", "xyz"]
            ),  # the last three unknown to some
            st.sampled_from([" ", "  ", "\n", " \n\n ", "\u3000", "\t"]),
        ),
        min_size=1,
    )
)
def test_a_word_start_stands_exactly_where_a_word_of_letters_begins(tokenizer, parts):
    if tokenizer.name == "unigram":  # it makes one token of unknown characters across line breaks
        parts = [(word if word in WORDS else "mat", space) for word, space in parts]
    text = "".join(word + space for word, space in parts)
    if tokenizer.name == "bert":  # it makes every CJK character a word
        text = text.replace("東京", "東 京")
    (encoded,) = tokenizer.encode([text])
    assert words_of(text, encoded) == text.split()


def test_word_starts_token_by_token(tokenizers):
    (encoded,) = tokenizers["bert"].encode(["the catmat, slowly"])
    tokens = tokenizers["bert"].hf.convert_ids_to_tokens(encoded.ids.tolist())
    starts = [token for token, start in zip(tokens, encoded.word_starts, strict=True) if start]
    assert starts == ["the", "cat", ",", "slowly"]
    assert tokens[:2] == ["the", "cat"]
    assert tokens[2].startswith("##")


def test_the_bytes_of_an_emoji_belong_to_the_word_of_their_space(tokenizers):
    for kind in ("gpt2", "llama", "llama-legacy"):
        (encoded,) = tokenizers[kind].encode(["cat 😀 mat"])
        assert words_of("cat 😀 mat", encoded) == ["cat", "😀", "mat"]
        assert (encoded.ends - encoded.starts)[encoded.starts == 4].tolist().count(1) >= 3


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "llama-legacy"])
def test_names_of_special_tokens_in_a_text_are_text(tokenizers, kind):
    tokenizer = tokenizers[kind]
    (encoded,) = tokenizer.encode(["[MASK] <|endoftext|> </s> [SEP] <s> [CLS]"])
    unknown = {tokenizer.hf.unk_token_id} - {tokenizer.eos_id}  # GPT-2's is its end of text
    assert not (tokenizer.special_ids - unknown) & set(encoded.ids.tolist())


def test_settings_that_came_with_a_tokenizer_do_not_cut_or_pad():
    hf = bert()
    hf.backend_tokenizer.enable_truncation(4)
    hf.backend_tokenizer.enable_padding(length=8)
    tokenizer = wrap_tokenizer(hf, "t")
    assert [len(e.ids) for e in tokenizer.encode(["the cat sat on the mat", "the"])] == [6, 1]
    assert hf.backend_tokenizer.truncation["max_length"] == 4


def test_a_long_text_gives_no_warning(capfd, tokenizers):
    tokenizers["bert"].encode(["the cat " * 5000])
    assert capfd.readouterr().err == ""


# --- pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", range(6, 30))
def test_pairs_agree_with_transformers(tokenizer, max_length):
    for a, b in [
        ("the cat sat on the mat", "one"),
        ("one", " ".join(WORDS)),
        (CORPUS[1], CORPUS[2]),
    ]:
        ids, types = tokenizer.encode_pair(a, b, 10_000)
        whole = tokenizer.hf(a, b, return_token_type_ids=True)
        assert ids.tolist() == whole["input_ids"]
        assert types.tolist() == whole["token_type_ids"]
        ids, types = tokenizer.encode_pair(a, b, max_length)
        assert ids.dtype == types.dtype == np.int32
        assert len(ids) == len(types) == min(max_length, len(whole["input_ids"]))


def test_pairs_are_cut_at_the_longer_text(tokenizers):
    ids, types = tokenizers["bert"].encode_pair("the cat", "one two three slowly", 8)
    tokens = tokenizers["bert"].hf.convert_ids_to_tokens(ids.tolist())
    assert tokens == ["[CLS]", "the", "cat", "[SEP]", "one", "two", "three", "[SEP]"]
    assert types.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_pairs_of_all_lengths_are_cut_as_the_tokenizer_cuts_them(tokenizer):
    """1 to 7 tokens each, at every limit: what experts were fine-tuned with."""
    texts = [" ".join(["cat"] * length) for length in range(1, 8)]
    added = tokenizer.hf.num_special_tokens_to_add(pair=True)
    for a, b in product(texts, repeat=2):
        for most in range(added + 2, added + 16):
            ids, types = tokenizer.encode_pair(a, b, most)
            cut = tokenizer.hf(a, b, truncation=True, max_length=most, return_token_type_ids=True)
            assert ids.tolist() == cut["input_ids"], (a, b, most)
            assert types.tolist() == cut["token_type_ids"], (a, b, most)


def test_a_pair_needs_room_for_a_token_of_each(tokenizers):
    assert len(tokenizers["bert"].encode_pair("the cat", "one two", 5)[0]) == 5
    with pytest.raises(ValueError, match="no room"):
        tokenizers["bert"].encode_pair("the cat", "one two", 4)


# --- saving and loading ---------------------------------------------------------------------------


def assert_same(one, two):
    assert one.digest == two.digest
    facts = ("size", "mask_id", "pad_id", "eos_id", "special_ids", "prefix", "suffix")
    assert [getattr(one, f) for f in facts] == [getattr(two, f) for f in facts]
    for found, wanted in zip(one.encode(TEXTS), two.encode(TEXTS), strict=True):
        assert all((a == b).all() for a, b in zip(found, wanted, strict=True))


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    assert has_tokenizer_files(tmp_path / "saved")
    assert_same(load_tokenizer(str(tmp_path / "saved")), tokenizer)


def test_pickling_changes_nothing(tokenizer):
    assert_same(pickle.loads(pickle.dumps(tokenizer)), tokenizer)


def test_published_vocabularies_have_their_known_ids(published):
    bert_base, gpt = published["bert-base-uncased"], published["gpt2"]
    assert (bert_base.size, gpt.size) == (30522, 50257)
    assert bert_base.encode(["Hello"])[0].ids.tolist() == [7592]
    assert gpt.encode(["Hello world"])[0].ids.tolist() == [15496, 995]
    assert (bert_base.prefix, bert_base.suffix, bert_base.mask_id) == ((101,), (102,), 103)
    assert (gpt.prefix, gpt.suffix, gpt.eos_id, gpt.pad_id) == ((), (), 50256, 0)


def test_published_vocabularies_survive_saving(published, tmp_path):
    for name, tokenizer in published.items():
        tokenizer.save(tmp_path / name)
        assert_same(load_tokenizer(str(tmp_path / name)), tokenizer)


def test_published_tokens_are_the_text_they_point_at(published):
    text = TEXTS[0] + " " + TEXTS[1]
    (encoded,) = published["bert-base-uncased"].encode([text])
    tokens = published["bert-base-uncased"].hf.convert_ids_to_tokens(encoded.ids.tolist())
    for token, start, end in zip(tokens, encoded.starts, encoded.ends, strict=True):
        plain = unicodedata.normalize("NFD", text[start:end].lower())
        plain = "".join(c for c in plain if unicodedata.category(c) != "Mn")
        assert token in ("[UNK]", plain, f"##{plain}")


def test_files_of_gpt2_under_either_name(tmp_path):
    model = json.loads(gpt2().backend_tokenizer.to_str())["model"]
    merges = "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in model["merges"])
    for vocabulary_name, merges_name in [
        ("encoder.json", "vocab.bpe"),
        ("vocab.json", "merges.txt"),
    ]:
        directory = tmp_path / merges_name
        directory.mkdir()
        (directory / vocabulary_name).write_text(json.dumps(model["vocab"]))
        assert not has_tokenizer_files(directory)
        (directory / merges_name).write_text(merges)
        assert has_tokenizer_files(directory)
        assert_same(load_tokenizer(str(directory)), wrap_tokenizer(gpt2(), "gpt2"))


def write_vocabulary(directory, tokens):
    (directory / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return str(directory)


def test_a_bert_vocabulary_with_capitals_keeps_case(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello"]
    uncased = load_tokenizer(write_vocabulary(tmp_path, tokens))
    assert uncased.encode(["HELLO hello"])[0].ids.tolist() == [5, 5]
    cased = load_tokenizer(write_vocabulary(tmp_path, [*tokens, "Hello"]))
    assert cased.encode(["Hello hello HELLO"])[0].ids.tolist() == [6, 5, 1]
    assert (cased.size, cased.prefix, cased.suffix) == (7, (2,), (3,))


def test_vocab_txt_alone_has_the_digest_of_the_saved_tokenizer(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "##s", "東"]
    alone = load_tokenizer(write_vocabulary(tmp_path, tokens))
    alone.save(tmp_path / "saved")
    assert not (tmp_path / "tokenizer.json").exists()
    assert_same(load_tokenizer(str(tmp_path / "saved")), alone)


def test_vocabularies_that_lack_their_special_tokens_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"lacks \[CLS\], \[SEP\], \[MASK\]"):
        load_tokenizer(write_vocabulary(tmp_path, ["[PAD]", "[UNK]", "hello"]))
    (tmp_path / "vocab.txt").unlink()
    (tmp_path / "encoder.json").write_text('{"a": 0}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match=r"lacks <\|endoftext\|>"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/place", "./no-such", "a/b/c"])
def test_a_directory_that_is_missing(name):
    assert not has_tokenizer_files(name)
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(name)


def test_a_file_or_a_directory_without_tokenizer(tmp_path):
    (tmp_path / "file").write_text("x")
    assert not has_tokenizer_files(tmp_path)
    with pytest.raises(InputError, match="has no tokenizer files"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(InputError, match="no such directory"):
        load_tokenizer(str(tmp_path / "file"))


def test_a_tokenizer_without_fast_implementation(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(InputError, match="no fast implementation"):
        load_tokenizer(str(tmp_path))


def test_the_file_that_is_no_tokenizer_is_named(tmp_path, wordpiece):
    shutil.copytree(wordpiece, tmp_path / "one")
    path = tmp_path / "one" / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["max_input_chars_per_word"] = 100.5
    path.write_text(json.dumps(values, indent=1))
    with pytest.raises(InputError, match=r"tokenizer\.json is not a tokenizer .*100\.5.* line \d+"):
        load_tokenizer(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("do_lower_case", -1, "-1; it must be true or false"),
        ("strip_accents", "no", "'no'; it must be true or false"),
        ("tokenizer_class", True, "True; it must be the name of a class"),
        ("model_max_length", {"a": 64}, "it must be a number of tokens"),
        ("model_max_length", 0, "0; it must be a number of tokens"),
    ],
)
def test_a_setting_of_another_type_is_named(tmp_path, wordpiece, key, value, rule):
    shutil.copytree(wordpiece, tmp_path / "one")
    path = tmp_path / "one" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(InputError, match=rf"tokenizer_config\.json: {key} is .*{rule}"):
        load_tokenizer(str(tmp_path / "one"))


def test_files_that_are_damaged(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(str(tmp_path))


def test_importing_it_is_cheap():
    code = (
        "import sys, rekindle.data.corpus.tokenizer, rekindle.data.corpus.packing;"
        "print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    )
    assert python(code) == "set()"
