"""Skip a rehearsal of stage 1 that has already passed with the same configuration and files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rekindle.pipeline.caching import cache_teachers as module

_PASSED = set[str]()  # in this process


@contextmanager
def rehearsed_once() -> Iterator[None]:
    """Rehearse once: for a small cache it is a fourth of the work, and most tests repeat it."""
    real = module.rehearse

    def rehearse(config: Any, teachers: Sequence[Any], store: Any) -> None:
        where = [*config.corpus.places, *(teacher.model for teacher in teachers)]
        masks = config.cache.model_copy(update={"path": ""})
        asked = (config.corpus, masks, teachers, config.student, config.train.objective)
        key = repr((asked, [_state(Path(one)) for one in where]))
        if key not in _PASSED:
            real(config, teachers, store)
            _PASSED.add(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "rehearse", rehearse)
        yield


def _state(path: Path) -> list[tuple[str, int, int]]:
    """Return the current state of every file at a path."""
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    return [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files]
