import ast
from collections import Counter
from pathlib import Path

import pytest

from rekindle.data.source.documents import Document, read_documents
from rekindle.data.source.python_docs import (
    PARTS,
    SHORTEST,
    _docs_in,
    _library_files,
    part_of,
    python_docs,
)
from testlib.command import python


@pytest.fixture(scope="module")
def docs():
    return list(python_docs())


def test_there_are_about_two_megabytes_of_text(docs):
    assert 1.5e6 < sum(len(doc.text.encode()) for doc in docs) < 4e6


def test_ids_and_texts_are_unique_and_no_text_is_short(docs):
    assert len({doc.id for doc in docs}) == len(docs)
    assert len({doc.text for doc in docs}) == len(docs)
    assert min(len(doc.text) for doc in docs) >= SHORTEST


def test_texts_are_cleaned(docs):
    # inspect.cleandoc leaves neither a tab nor an empty line around the text.
    assert not [doc.id for doc in docs if "\t" in doc.text or doc.text.strip("\n") != doc.text]


def test_order_is_by_module_after_the_topics(docs):
    modules = [doc.module for doc in docs if doc.kind != "topic"]
    assert modules == sorted(modules)
    topics = [doc.id for doc in docs if doc.kind == "topic"]
    assert topics == sorted(topics)
    assert [doc.id for doc in docs[: len(topics)]] == topics


def test_known_docs_carry_their_names(docs):
    by_id = {doc.id: doc for doc in docs}
    decode = by_id["json.decoder:JSONDecoder.decode"]
    assert (decode.kind, decode.module, decode.part) == ("function", "json.decoder", "text")
    assert decode.text.startswith("Return the Python representation of")
    assert by_id["json.decoder:JSONDecoder"].kind == "class"
    assert by_id["heapq"].kind == "module"
    assert by_id["topics:assert"].kind == "topic"


def test_tests_and_idle_are_left_out(docs):
    skipped = {"test", "tests", "idlelib", "lib2to3", "pydoc_data"}
    assert not [doc.id for doc in docs if skipped & set(doc.module.split("."))]


def test_every_part_has_enough_docs_and_none_dominates(docs):
    counts = Counter(doc.part for doc in docs)
    assert set(counts) == set(PARTS)
    assert min(counts.values()) > 300
    assert max(counts.values()) < 3.5 * min(counts.values())


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("_pydecimal", "data and numbers"),
        ("_py_abc", "data and numbers"),
        ("_threading_local", "concurrency and processes"),
        ("xml.etree.ElementTree", "text"),
        ("__future__", "language runtime"),
        ("a_module_of_python_4", "language runtime"),
    ],
)
def test_part_of(module, part):
    assert part_of(module) == part


def test_names_of_nested_and_repeated_definitions(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        '"""Module."""\n'
        "class A:\n"
        '    """Class."""\n'
        "    async def f(self):\n"
        '        """First."""\n'
        "        def inner():\n"
        '            """Inner."""\n'
        "try:\n"
        "    import x\n"
        "except ImportError:\n"
        "    def g():\n"
        '        """In a handler."""\n'
        "else:\n"
        "    def g():\n"
        '        """Again."""\n'
    )
    found = [(doc.id, doc.kind, doc.text) for doc in _docs_in("m", path)]
    assert found == [
        ("m", "module", "Module."),
        ("m:A", "class", "Class."),
        ("m:A.f", "function", "First."),
        ("m:A.f.inner", "function", "Inner."),
        ("m:g", "function", "In a handler."),
        ("m:g#2", "function", "Again."),
    ]


def test_every_docstring_of_a_file_is_found():
    import argparse

    path = Path(argparse.__file__)
    tree = ast.parse(path.read_bytes())
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    expected = [ast.get_docstring(n) for n in ast.walk(tree) if isinstance(n, kinds)]
    found = [doc.text for doc in _docs_in("argparse", path)]
    assert sorted(found) == sorted(text for text in expected if text)


def test_files_that_do_not_parse_or_are_of_a_test_package_are_passed_over(tmp_path):
    (tmp_path / "bad.py").write_text("def (:\n")
    (tmp_path / "nul.py").write_bytes(b"\0")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A test."""\n')
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text('"""A package."""\n')
    files = _library_files(tmp_path)
    assert [module for module, _ in files] == ["bad", "nul", "pkg"]
    assert [doc.id for module, path in files for doc in _docs_in(module, path)] == ["pkg"]


def test_read_documents_gives_them_with_their_part_as_domain(docs, monkeypatch):
    monkeypatch.setattr(
        "rekindle.data.source.documents.python_docs", lambda: iter(docs)
    )  # read once
    expected = [Document(doc.id, doc.text, doc.part) for doc in docs]
    assert list(read_documents(["python-docs"], domain_field="ignored")) == expected


def test_the_library_is_read_and_not_imported():
    """Not the first modules by name, `antigravity` among them: reading all takes seconds."""
    code = (
        "import sys; from itertools import islice; "
        "from rekindle.data.source.python_docs import python_docs; "
        "read = {doc.module for doc in islice(python_docs(), 700)}; "
        "assert {'antigravity', 'asyncio.events'} <= read, read; "
        "print({'antigravity', 'tkinter', 'asyncio', 'this'} & set(sys.modules))"
    )
    assert python(code) == "set()"
