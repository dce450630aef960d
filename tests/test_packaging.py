"""How it is installed: under a name of its own, from a checkout, in versions that were tested."""

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from rekindle.train.record.versions import DISTRIBUTION, package_versions

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
TOLD = (".md", ".py", ".yaml", ".toml", ".txt", ".j2", "")  # suffixes of files with words in them
PLACES = ("*", ".ci/*", "docs/*", *(f"{top}/**/*" for top in ("pipeline", "train", "kernels")))
FILES = sorted(
    path
    for place in (*PLACES, "data/**/*", "tests/**/*")
    for path in ROOT.glob(place)
    if path.is_file() and path.suffix in TOLD and "__pycache__" not in path.parts
)

# The arguments of `pip install`, to the command's end.
COMMAND = re.compile(r"\bpip3?\s+install((?:\\\n|[^\n`;&|])*)")
INLINE = re.compile(r"`([^`]+)`")
# A distribution's name that an index would be asked for: neither a path nor a module.
OF_AN_INDEX = re.compile(r"(?<![\w./:-])rekindle(?:[-_.]kd)?(?![\w/-]|\.\w)", re.IGNORECASE)


def pieces(path: Path, text: str) -> Iterator[str]:
    """The text, and code in running words unwrapped; of Python the comments and the strings."""
    if "install" not in text:
        return
    if path.suffix != ".py":
        yield text
        yield from (" ".join(code.split()) for code in INLINE.findall(re.sub("`{3,}", "", text)))
        return
    yield from re.findall("#.*", text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Constant | ast.JoinedStr):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            said = [str(part.value) for part in parts if isinstance(part, ast.Constant)]
            yield from pieces(Path(), "".join(said))


def asked_of_an_index(path: Path, text: str) -> set[str]:
    """The commands that have pip ask an index for us: what it finds there is not ours."""
    found = {c.strip() for piece in pieces(path, text) for c in COMMAND.findall(piece)}
    return {command for command in found if OF_AN_INDEX.search(command)}


@pytest.mark.parametrize("name", ["rekindle", "rekindle-kd", "Rekindle_KD"])
@pytest.mark.parametrize(
    "command",
    ["{}", "'{}[s3]'", '"{}[s3, dev]"', "-U {}", "{}>=0.1", "numpy \\\n  {}[s3]", "-c x.txt {}."],
)
def test_a_command_that_asks_an_index_is_found(name, command):
    told = "pip install " + command.format(name)
    assert asked_of_an_index(Path("a.md"), f"First:\n\n```bash\n{told}\n```\n")
    assert asked_of_an_index(Path("a.md"), f"install it (`{told}`)")
    assert asked_of_an_index(Path("run"), f"# {told}\n")
    assert asked_of_an_index(Path("a.py"), f"raise ValueError({told!r})")


def test_a_command_that_is_wrapped_is_found():
    wrapped = "pip\ninstall {}".format("rekindle")
    assert asked_of_an_index(Path("a.md"), f"install the extra: `{wrapped}`")
    for first in ("'the extra: pip '", "f'{what}: pip '"):
        code = f"({first} 'install \"%s[s3]\"')" % "rekindle"
        assert asked_of_an_index(Path("a.py"), code)
    assert asked_of_an_index(Path("a.py"), "pass  # {}".format(wrapped.replace("\n", " ")))


@pytest.mark.parametrize(
    "command",
    [
        "pip install -e '.[s3]'; import rekindle",
        "pip install -e . && pipeline rekindle cycle.yaml",
        "pip install -e .\npipeline rekindle cycle.yaml",
        "pip install ./rekindle dist/rekindle_kd-0.1.0-py3-none-any.whl",
        "pip uninstall rekindle",
    ],
)
def test_a_command_that_does_not_is_none(command):
    assert not asked_of_an_index(Path("a.md"), f"```bash\n{command}\n```\n")


def test_nobody_is_told_to_install_a_strangers_package():
    """`rekindle` on PyPI is somebody else's; ours is on no index, under no name."""
    found = {str(p.relative_to(ROOT)): asked_of_an_index(p, p.read_text("utf-8")) for p in FILES}
    assert len(found) > 400
    assert not {path: commands for path, commands in found.items() if commands}


def test_the_extras_that_are_told_are_there():
    found = {
        extra.strip()
        for path in FILES
        for names in re.findall(r"install -e '\.\[([^]]*)\]'", path.read_text("utf-8"))
        for extra in names.split(",")
    }
    assert found == set(EXTRAS)


# --- the distribution -----------------------------------------------------------------------------


def requirements() -> list[Requirement]:
    lines = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
    return list(map(Requirement, lines))


def test_the_name_is_our_own():
    assert PROJECT["name"] == DISTRIBUTION != "rekindle"
    ours = {"rekindle", canonicalize_name(DISTRIBUTION)}
    assert not ours & {canonicalize_name(needed.name) for needed in requirements()}


def test_whoever_develops_has_every_extra():
    names = {extra: {Requirement(line).name for line in lines} for extra, lines in EXTRAS.items()}
    everything = names["dev"] | names["test-extras"]
    assert all(needed <= everything for needed in names.values())


def test_our_version_where_nothing_is_installed(monkeypatch):
    assert package_versions()["rekindle"] == PROJECT["version"]
    monkeypatch.setattr("rekindle.train.record.versions.DISTRIBUTION", "rekindle-of-nobody")
    assert package_versions()["rekindle"] == "not installed"


# --- constraints.txt ------------------------------------------------------------------------------


def pins() -> dict[str, Version]:
    """The version of each distribution. Every line that is no comment is one pin."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [re.fullmatch(r"([\w.-]+)==([\w.!]+)", line) for line in lines if line[0] != "#"]
    assert None not in pinned  # also not 2.13.0+cpu: that would be for one kind of machine
    return {canonicalize_name(found[1]): Version(found[2]) for found in pinned if found}


def test_every_dependency_is_pinned_within_its_range():
    pinned = pins()
    assert not {"rekindle", DISTRIBUTION} & pinned.keys()
    wrong = []
    for needed in requirements():
        version = pinned.get(canonicalize_name(needed.name))
        if version is None or not needed.specifier.contains(version, prereleases=True):
            wrong.append(f"{needed}: {version or 'not pinned'}")
    assert not wrong


def test_the_commands_take_the_versions_that_were_tested():
    readme = (ROOT / "README.md").read_text("utf-8")
    _, _, told = readme.partition("these two lines are what CI runs -->\n```bash\n")
    commands = told.partition("\n```")[0].splitlines()
    assert len(commands) == 2
    assert all(" -c constraints.txt && " in command for command in commands)
