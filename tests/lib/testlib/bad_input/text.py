"""Bad text: in a corpus, and in rows that a model is asked about."""

import os

from testlib.bad_input.row import Bad

NEW = "cache-teachers run.yaml --set cache.path=new"
SKIP = "corpus.on_bad_record: skip"
PREDICT = "predict expert --text bad.jsonl --out new.jsonl"


def _text(*rows: object):
    return lambda place: place.rows("text.jsonl", *rows)


def _raw(name: str, content: str | bytes):
    return lambda place: place.write(name, content)


def _of(name: str) -> str:
    return f"{NEW} --set corpus.source=[{name}]"


CORPUS = (
    Bad("no such text", _of("none.jsonl"), "'none.jsonl'", "neither a file, a glob",
        "give an existing file"),
    Bad("a glob that matches nothing", f"{NEW} --set 'corpus.source=[\"*.txt\"]'", "'*.txt'",
        "a glob that matches files", "give an existing file"),
    Bad("a folder as the source", _of("tokens"), "tokens", "is a directory",
        "name its files with a glob"),
    Bad("a pipe as corpus", _of("pipe.jsonl"), "pipe.jsonl", "read more than once",
        "write its output to a file", lambda place: os.mkfifo(place / "pipe.jsonl")),
    Bad("a source with an unknown file extension",
        _of("run.yaml"), "run.yaml", "unknown extension", "known are"),
    Bad("an empty text", NEW, "text.jsonl", "the corpus is empty", "at least one non-blank",
        _raw("text.jsonl", "")),
    Bad("blank texts", NEW, "text.jsonl", "the corpus is empty", "at least one non-blank",
        _text({"text": "  "})),
    Bad("a binary file as text",
        NEW, "NUL byte at byte 1", "it is not UTF-8 text", "convert or replace it",
        _raw("text.jsonl", bytes(range(256)))),
    Bad("a text in Latin-1", _of("a.txt"), "a.txt:1", "not UTF-8", "convert the file to UTF-8",
        _raw("a.txt", "la nuit où tombe la neige".encode("latin1"))),
    Bad("a truncated line of JSON", NEW, "text.jsonl:2", "not JSON", SKIP,
        _raw("text.jsonl", '{"text": "a river"}\n{"text": "a river\n')),
    Bad("one JSON array instead of JSON lines", NEW, "text.jsonl:1", "each line must be one object",
        "jq -c '.[]'", _raw("text.jsonl", '[{"text": "a"}]\n')),
    Bad("a field that is missing", f"{NEW} --set corpus.text_field=body", "text.jsonl, record 1",
        "no field 'body' (corpus.text_field)", "it has: id, text, domain"),
    Bad("a number as text", NEW, "text.jsonl, record 2", "the text must be a string", SKIP,
        _text({"text": "a river runs"}, {"text": 3})),
    Bad("null as text", NEW, "text.jsonl, record 2", "is null", SKIP,
        _text({"text": "a river runs"}, {"text": None})),
    Bad("half a surrogate pair", NEW, "character 3 of the text", "which is not a Unicode character",
        "repair the text", _raw("text.jsonl", '{"text": "a \\ud800 b"}\n')),
    Bad("no such domain field", f"{NEW} --set corpus.domain_field=source", "text.jsonl, record 1",
        "no field 'source' (corpus.domain_field)", "it has: id, text, domain"),
    Bad("no such group field", f"{NEW} --set corpus.group_field=query", "text.jsonl, record 1",
        "no field 'query' (corpus.group_field)", "it has: id, text, domain"),
    Bad("no such field for the second text of pairs",
        f"{NEW} --set corpus.pair_field=second", "text.jsonl, record 1",
        "no field 'second' (corpus.pair_field)", "it has: id, text, domain"),
    Bad("a truncated compressed file", _of("a.jsonl.zst"), "a.jsonl.zst", "Truncated",
        "copy it again", _raw("a.jsonl.zst", b"\x28\xb5\x2f\xfd\x04")),
    Bad("a parquet file that is not parquet",
        _of("a.parquet"), "a.parquet", "cannot be read as parquet",
        "copy it again", _raw("a.parquet", b"PAR1 nothing")),
    Bad("a truncated Arrow file", _of("a.arrow"), "a.arrow", "cannot be read as arrow",
        "copy it again", _raw("a.arrow", b"ARROW1")),
    Bad("a csv row with too many cells", _of("a.csv"), "a.csv, row 1",
        "has 4 fields, but the first line names 2", "quote the text",
        _raw("a.csv", "text,label\na,b,c,d\n")),
    Bad("a table without the column", _of("a.csv"), "a.csv, row 1", "no field 'text'",
        "the first line names its columns: one river", _raw("a.csv", "one river\ntwo\n")),
    Bad("dialogues without a chat template", f"{NEW} --set corpus.format=chat", "tokens",
        "has no chat template", "corpus.chat_template: FILE"),
    Bad("rows of tokens for a classifier", f"{NEW} --set corpus.format=tokens",
        "teacher 'expert'", "rows of the format tokens have none", "cache it over a corpus"),
    Bad("an unknown built-in", f"{NEW} --set corpus.tokenizer=python-docs/brt",
        "'python-docs/brt'", "there is no built-in", "did you mean 'python-docs/bert'?"),
)  # fmt: skip

ASKED = (
    Bad("no such file of rows", "predict expert --text none.jsonl --out new.jsonl", "'none.jsonl'",
        "no such file", "give a jsonl, csv, tsv, txt or parquet file"),
    Bad("a folder as the file of rows", "predict expert --text tokens --out new.jsonl", "'tokens'",
        "is a folder", "give a jsonl"),
    Bad("rows without the column", "predict expert --text text.jsonl --text-field body --out new",
        "text.jsonl", "has no column 'body' (it has: id, text, domain)", "--text-field"),
    Bad("a truncated second row", PREDICT, "bad.jsonl:2", "not JSON",
        "each line must be one object", _raw("bad.jsonl", '{"text": "a"}\n{"text": \n')),
    Bad("a second row without the text", PREDICT, "bad.jsonl, row 2", "text must be a string",
        "the row has: txt", _raw("bad.jsonl", '{"text": "a"}\n{"txt": "a"}\n')),
    Bad("an empty file of rows", PREDICT, "bad.jsonl", "has no rows", "give at least one text",
        _raw("bad.jsonl", "")),
    Bad("texts without a token to predict", "evaluate lm --text bad.jsonl", "bad.jsonl",
        "no token to predict", "give texts of two or more", _raw("bad.jsonl", '{"text": ""}\n')),
    Bad("generate with a masked LM", "generate lm --prompts text.jsonl --out new.jsonl", "'lm'",
        "only a causal language model can generate"),
)  # fmt: skip

ROWS = CORPUS + ASKED
