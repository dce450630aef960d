"""Speed up Triton's interpreter by caching repeated work.

For each launch, and for each call between kernels, it searches all members of triton.language for
those it replaces, which takes half of a small launch.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def quick_interpreter() -> Iterator[None]:
    """Cache the members found in triton.language; within a launch, replace all of them."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    if not hasattr(interpreter, "_LangPatchScope"):  # another version
        yield
        return
    language, scope = interpreter.tl, interpreter._LangPatchScope
    replace, found = interpreter._patch_lang, dict[int, list[tuple[str, Any]]]()

    def replaced(fn: Any) -> Any:
        # Only replaced members print with Python's own print; the launch restores them.
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
