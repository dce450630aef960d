"""The demo corpus: the documentation that every installed Python carries, about 2 MB of English.

Reads the standard library's source files and never imports them. Corpora and tokens are unknown
here.
"""

import ast
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Kind = Literal["module", "class", "function", "topic"]

SHORTEST = 40  # characters; shorter docstrings ("Return x.") teach nothing
_SKIPPED = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}

# The parts of the library by top-level module, without a leading underscore or "_py". They follow
# the chapters of the library reference, joined so that no part is more than about twice another.
_MODULES_OF_PART = {
    "text": """
        base64 binascii codecs configparser csv difflib encodings gettext html json locale
        markupbase plistlib pyexpat quopri re regex sre_compile sre_constants sre_parse string
        stringprep textwrap tomllib unicodedata uu xdrlib xml""",
    "data and numbers": """
        abc array bisect calendar collections collections_abc colorsys copy copyreg dataclasses
        datetime decimal enum fractions functools graphlib heapq itertools math numbers operator
        pprint random reprlib secrets statistics strptime struct time types typing uuid weakref
        weakrefset zoneinfo""",
    "files and persistence": """
        aifc aix_support bz2 chunk compression compat_pickle dbm filecmp fileinput fnmatch
        genericpath glob gzip hashlib imghdr io linecache lzma mimetypes ntpath nturl2path os
        pathlib pickle pickletools posixpath shelve shutil sndhdr sqlite3 stat sunau tarfile
        tempfile wave zipapp zipfile""",
    "networking and internet": """
        asynchat asyncore cgi cgitb crypt email ftplib hmac http imaplib ipaddress mailbox mailcap
        netrc nntplib poplib smtpd smtplib socket socketserver ssl telnetlib urllib wsgiref
        xmlrpc""",
    "concurrency and processes": """
        asyncio concurrent contextvars multiprocessing pipes pty queue sched selectors signal
        subprocess threading threading_local""",
    "development and testing": """
        bdb cProfile compileall distutils doctest ensurepip lsprof logging modulefinder pdb profile
        pstats py_compile pyclbr pydoc tabnanny timeit trace tracemalloc unittest
        venv""",
    "language runtime": "",  # topics, and modules that no other part names
    "interface": """
        antigravity argparse cmd colorize curses getopt getpass optparse pyrepl readline rlcompleter
        shlex tkinter tty turtle turtledemo webbrowser""",
}
PARTS = tuple(_MODULES_OF_PART)
_PART_OF_MODULE = {
    module: part for part, modules in _MODULES_OF_PART.items() for module in modules.split()
}
_PART_OF_THE_REST = "language runtime"


@dataclass(frozen=True)
class PythonDoc:
    """One docstring or help topic, without its indentation.

    ``id`` is "json.decoder:JSONDecoder.decode", "json.decoder" for the module's own text, or
    "topics:assert"; ``module`` is "json.decoder" or "topics"; ``part`` is one of PARTS.
    """

    id: str
    text: str
    kind: Kind
    module: str
    part: str


def python_docs() -> Iterator[PythonDoc]:
    """Yield help topics by name, then docstrings by module name and place in the file.

    The order and the texts depend only on the Python version. Texts under 40 characters and exact
    repetitions of an earlier text are left out. Test packages, idlelib, lib2to3, site-packages and
    files that do not parse are skipped.
    """
    seen: set[str] = set()
    for page in _all_docs():
        if len(page.text) >= SHORTEST and page.text not in seen:
            seen.add(page.text)
            yield page


def _all_docs() -> Iterator[PythonDoc]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        text = inspect.cleandoc(topics[name])
        yield PythonDoc(f"topics:{name}", text, "topic", "topics", _PART_OF_THE_REST)
    for module, path in _library_files(Path(sysconfig.get_path("stdlib"))):
        yield from _docs_in(module, path)


# Cached: the files do not change, and a run reads them more than once, to sample and to build.
@cache
def _library_files(root: Path) -> list[tuple[str, Path]]:
    files = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        importable = all(part.isidentifier() for part in parts)
        if importable and not _SKIPPED.intersection(parts):
            names = parts[:-1] if parts[-1] == "__init__" else parts
            files.append((".".join(names), path))
    return sorted(files)


@cache
def _docs_in(module: str, path: Path) -> tuple[PythonDoc, ...]:
    try:
        with warnings.catch_warnings():
            # old modules have invalid escapes, which do not matter here
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return ()
    part = part_of(module)
    used: dict[str, int] = {}
    found = []
    for name, kind, text in _docstrings(tree):
        full = f"{module}:{name}" if name else module
        used[full] = used.get(full, 0) + 1
        if used[full] > 1:  # defined again, for example under an ``if``
            full = f"{full}#{used[full]}"
        found.append(PythonDoc(full, text, kind, module, part))
    return tuple(found)


def _docstrings(
    node: ast.AST, name: str = "", kind: Kind = "module"
) -> Iterator[tuple[str, Kind, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node, clean=True)
        if text:
            yield name, kind, text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _docstrings(child, _below(name, child.name), "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child, _below(name, child.name), "function")
        elif isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child, name)


def _below(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def part_of(module: str) -> str:
    """Return the part of the standard library that a dotted module name belongs to."""
    top = module.partition(".")[0]
    for name in (top, top.removeprefix("_"), top.removeprefix("_py").lstrip("_")):
        if name in _PART_OF_MODULE:
            return _PART_OF_MODULE[name]
    return _PART_OF_THE_REST
