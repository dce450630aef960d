"""The house: which folder may import which, what the packages are called, how fast help answers."""

import ast
import resource
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

import pytest

from testlib.command import python

ROOT = Path(__file__).parents[1]
FOLDERS = ("pipeline", "train", "kernels", "data")
# What a folder may import of ours: itself and what stands below it.
MAY_IMPORT = {
    "pipeline": {"pipeline", "train", "kernels", "data"},
    "train": {"train", "kernels", "data"},
    "kernels": {"kernels"},
    "data": {"data"},
}
# Third parties that have one home. triton: the kernels; ray: the one executor that uses it.
HOMES = {
    "typer": ("pipeline/cli.py", "pipeline/commands/*.py"),
    "triton": ("kernels/*.py",),
    "ray": ("pipeline/processes/*.py",),
    "fsspec": ("data/storage/client.py",),
    "sklearn": ("train/finetune/metrics.py",),
}
LONGEST_FILE, LONGEST_TEST = 400, 600
MOST_FILES = 20  # Python files in a folder
ONLY_IN_TESTS = ("pytest", "hypothesis", "moto", "polars", "duckdb", "playwright")

MODULES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("**/*.py"))]
NAMES = [str(path.relative_to(ROOT)) for path in MODULES]
# The sub-packages of each folder, as dotted names.
ROOMS = {
    folder: sorted(
        ".".join(path.relative_to(ROOT).parts)
        for path in (ROOT / folder).rglob("*")
        if path.is_dir() and any(path.glob("*.py"))
    )
    for folder in FOLDERS
}


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path):
    """Every module that a file imports, also inside functions, as dotted names."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; write rekindle.<folder>.<module>"
            yield node.module
            # `from rekindle import train` names a folder too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called.endswith("import_module"):
                yield ast.literal_eval(node.args[0])


@cache
def imports():
    """What each file imports: read for the tests that ask, not by every process that collects."""
    return {name: list(imports_of(ROOT / name)) for name in NAMES}


def test_there_are_modules_in_every_folder():
    assert {name.split("/")[0] for name in NAMES} == set(FOLDERS)


def test_imports_run_downward_only():
    wrong = []
    for name, modules in imports().items():
        allowed = MAY_IMPORT[name.split("/")[0]]
        for module in modules:
            first, second, *_ = [*module.split("."), ""]
            if first in FOLDERS or (first == "rekindle" and second not in {*allowed, ""}):
                wrong.append(f"{name} imports {module}")
    assert not wrong


# Which files of ours a file imports. A room's own name is no file of it: its __init__.py holds one
# sentence and imports nothing.
FILES = {f"rekindle.{name.removesuffix('.py').replace('/', '.')}": name for name in NAMES}


def arrows():
    return {
        name: {FILES[module] for module in modules if module in FILES} - {name}
        for name, modules in imports().items()
    }


def room_of(name):
    """The sub-package of a file; a file directly in a top folder is a node of its own."""
    folder = str(Path(name).parent)
    return name if folder in FOLDERS else folder


def circle_in(arrows):
    """Nodes each of which imports the next, and the last the first; None where there is none."""
    try:
        TopologicalSorter(arrows).prepare()
    except CycleError as found:
        return found.args[1][::-1]
    return None


def test_no_files_import_each_other_in_a_circle():
    """Nor under TYPE_CHECKING or within a function: what needs each other belongs together."""
    assert circle_in(arrows()) is None


def test_no_rooms_import_each_other_in_a_circle():
    rooms = {room_of(name): set() for name in NAMES}
    for name, imported in arrows().items():
        rooms[room_of(name)] |= {room_of(other) for other in imported} - {room_of(name)}
    assert circle_in(rooms) is None


def test_no_folder_is_too_full():
    paths = [*map(Path, NAMES), *(p.relative_to(ROOT) for p in (ROOT / "tests").rglob("*.py"))]
    counted = Counter(path.parent for path in paths if path.name != "__init__.py")
    assert not {folder: count for folder, count in counted.items() if count > MOST_FILES}


def test_no_folder_is_a_regular_package():
    """They form a namespace. Hugging Face ships a package called `kernels`, which transformers
    imports when it is there: a `kernels/__init__.py` at the top of this repository would be taken
    for it by every process that is started here, and a flat package of that name would overwrite
    its files on installation. `data`, `train` and `pipeline` are names that others use as well.
    """
    assert not [folder for folder in FOLDERS if (ROOT / folder / "__init__.py").exists()]
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_distribution_has_the_four_namespaced_packages():
    with open(ROOT / "pyproject.toml", "rb") as file:
        setuptools = tomllib.load(file)["tool"]["setuptools"]
    packages = [name for folder in FOLDERS for name in (folder, *ROOMS[folder])]
    assert setuptools["packages"] == [f"rekindle.{name}" for name in packages]
    assert setuptools["package-dir"] == {f"rekindle.{folder}": folder for folder in FOLDERS}
    for folder in FOLDERS:
        assert list(find_spec(f"rekindle.{folder}").submodule_search_locations)
        link = ROOT / ".ns/rekindle" / folder  # for mypy and editors only
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder
    commands = {e.name: e.value for e in distribution("rekindle-kd").entry_points}
    assert commands == {"pipeline": "rekindle.pipeline.cli:main"}


def test_bare_names_at_the_root_are_not_ours(tmp_path):
    """`import kernels` where this repository is the current folder finds Hugging Face's package.

    A folder without __init__.py yields to a regular package anywhere on the path, also behind it.
    """
    for name in FOLDERS:
        package = tmp_path / "site" / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("WHOSE = 'theirs'\n")
    code = "import {0}, rekindle.{0}; print({0}.WHOSE, {0}.__file__)"
    for name in FOLDERS:
        whose, file = python(code.format(name), cwd=ROOT, PYTHONPATH=str(tmp_path / "site")).split()
        assert whose == "theirs"
        assert Path(file).is_relative_to(tmp_path)


def test_an_installation_gives_no_bare_names(tmp_path):
    """Away from the repository, nothing of ours answers to them."""
    code = (
        "from importlib.util import find_spec\n"
        f"for name in {FOLDERS}:\n"
        "    spec = find_spec(name)\n"
        "    print([] if spec is None else [spec.origin, *(spec.submodule_search_locations or [])])"
    )
    assert str(ROOT) not in python(code, cwd=tmp_path)


def test_every_room_says_in_one_sentence_what_it_is():
    """Its __init__.py holds that sentence and nothing else: a name is imported from its module."""
    wrong = []
    for room in (name for rooms in ROOMS.values() for name in rooms):
        path = ROOT / room.replace(".", "/") / "__init__.py"
        if not path.exists() or len(path.read_text("utf-8").splitlines()) != 1:
            wrong.append(room)
    assert not wrong


@pytest.mark.slow
def test_transformers_can_be_imported_at_the_root():
    code = "import transformers.modeling_utils as m; print(m.__name__)"
    assert python(code, cwd=ROOT) == "transformers.modeling_utils"


def test_every_module_says_what_it_is():
    """Its docstring begins with a sentence."""
    told = {
        name: (ast.get_docstring(tree_of(ROOT / name)) or "").split("\n\n")[0] for name in NAMES
    }
    assert not [name for name, first in told.items() if not first.endswith((".", ":"))]


def users_of(package):
    return [
        name for name, modules in imports().items() if package in {m.split(".")[0] for m in modules}
    ]


@pytest.mark.parametrize("package", HOMES)
def test_third_parties_have_one_home(package):
    homes = HOMES[package]
    strays = [name for name in users_of(package) if not any(map(Path(name).match, homes))]
    assert not strays


def test_ray_has_one_file():
    assert len(users_of("ray")) <= 1


def test_what_the_tests_need_is_not_needed_to_run():
    assert not [name for package in ONLY_IN_TESTS for name in users_of(package)]


def test_no_file_is_too_long():
    limits = {ROOT / name: LONGEST_FILE for name in NAMES}
    limits |= dict.fromkeys((ROOT / "tests").rglob("*.py"), LONGEST_TEST)
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in limits}
    assert not {str(path): n for path, n in lines.items() if n > limits[path]}


# --- what is imported when ------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "datasets", "triton", "numpy", "pyarrow")
HELP = """
import sys
sys.argv = ["pipeline", *{arguments!r}]
from rekindle.pipeline.cli import main
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
found = [name for name in {heavy!r} if name in sys.modules]
assert not found, found
"""


@pytest.mark.parametrize("arguments", [["--help"], ["cache-teachers", "--help"], ["verify", "-h"]])
def test_help_imports_nothing_heavy(arguments):
    shown = python(HELP.format(arguments=arguments, heavy=HEAVY), cwd=ROOT)
    assert "Usage: pipeline" in shown


def test_help_is_instant():
    """Beside what typer itself takes on this machine: processor time, the best of three each."""
    command = [str(Path(sys.executable).parent / "pipeline"), "--help"]
    if not Path(command[0]).exists():
        command = [sys.executable, "-m", "rekindle.pipeline.cli", "--help"]
    typer = [sys.executable, "-c", "import typer, rich.console, rich.table, rich.panel"]
    ours, theirs = (min(_taken(each) for _ in range(3)) for each in (command, typer))
    assert ours < 4 * theirs, (ours, theirs)


def _taken(command):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_ground_floor_needs_no_torch():
    """Reading a cache or a configuration loads neither torch nor transformers; nor does a plan of
    models that are not made yet."""
    names = [name.removesuffix(".py").replace("/", ".") for name in NAMES]
    modules = [f"rekindle.{name}" for name in names if name.startswith("data.")]
    modules += ["rekindle.pipeline.config", "rekindle.train.config", "rekindle.pipeline.plan.run"]
    code = (
        f"import sys, {', '.join(modules)}\n"
        "print([m for m in ('torch', 'transformers', 'datasets', 'triton') if m in sys.modules])"
    )
    assert python(code, cwd=ROOT) == "[]"
