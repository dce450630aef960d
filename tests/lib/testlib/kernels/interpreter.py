"""Triton's interpreter, which does the same work again and again, made to do it once.

For each launch, and for each call of one kernel by another, it looks through all members of
triton.language for those it puts its own in place of: half of the time of a small launch.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """What is found in triton.language is remembered; within a launch all of it is replaced."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):  # another version
        yield
        return
    language, scope = interpreter.tl, interpreter._LangPatchScope
    replace, found = interpreter._patch_lang, dict[int, list[tuple[str, Any]]]()

    def replaced(fn: Any) -> Any:
        # Only what was replaced prints by Python's own; the launch puts back what was there.
        modules = [m for m in fn.__globals__.values() if m is language or m is language.core]
        return scope() if all(m.static_print is print for m in modules) else replace(fn)

    def builtins_replaced(package: Any, builder: Any, scope: Any) -> None:
        if id(package) not in found:
            is_builtin = language.core.is_builtin
            found[id(package)] = [m for m in inspect.getmembers(package) if is_builtin(m[1])]
        for name, member in found[id(package)]:
            interpreter._patch_attr(package, name, member, builder, scope)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replaced)
        patch.setattr(interpreter, "_patch_builtin", builtins_replaced)
        yield
