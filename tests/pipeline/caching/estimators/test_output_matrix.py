"""Hidden states and the output matrix that makes logits of them."""

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rekindle.data.cache import Cache
from rekindle.data.errors import CacheError
from rekindle.data.storage.store import open_store
from rekindle.data.targets.head import StoredHead, write_head
from rekindle.pipeline.caching import make_unit
from rekindle.pipeline.caching.cache_teachers import StageOne, cache_teachers
from rekindle.pipeline.checks.verify import verify_cache
from testlib.estimators import log_softmax, targets_of, teachers_of
from testlib.models import AUTO
from testlib.run_alone import model_of


def test_the_output_matrix_is_stored_once(world):
    folder = world.folders["default"]
    assert list(folder.rglob("head*.safetensors")) == [
        folder / "targets" / "hidden" / "head.safetensors"
    ]
    stored = load_file(folder / "targets" / "hidden" / "head.safetensors")
    module = model_of(world.model, AUTO[world.task]).get_output_embeddings()
    assert np.array_equal(stored["weight"], module.weight.detach().numpy())
    if module.bias is not None:
        assert np.array_equal(stored["bias"], module.bias.detach().numpy())
    else:
        assert set(stored) == {"weight"}
    # Per position two bytes a value, not four a token.
    cache = world.open()
    assert cache.teachers["hidden"].bytes < cache.teachers["dense"].bytes / 4


def test_the_output_matrix_is_not_written_again(tmp_path, configure, make_model, wordpiece):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    config = configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"]))
    cache_teachers(config)
    files = [tmp_path / "targets" / "hidden" / n for n in ("head.safetensors", "head.json")]
    before = [(f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files]
    assert cache_teachers(config) == StageOne(12, 0, 3)
    assert [(f.stat().st_ino, f.stat().st_mtime_ns, f.read_bytes()) for f in files] == before


@pytest.mark.parametrize("damage", ["gone", "flipped", "record gone"])
def test_an_output_matrix_that_is_lost_is_made_again(
    tmp_path, configure, make_model, wordpiece, damage
):
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    config = configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"]))
    cache_teachers(config)
    file = tmp_path / "targets" / "hidden" / "head.safetensors"
    whole = file.read_bytes()
    if damage == "gone":
        file.unlink()
    elif damage == "flipped":
        file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    else:
        file.with_name("head.json").unlink()
    assert cache_teachers(config).units_done == 0
    assert file.read_bytes() == whole
    assert verify_cache(str(tmp_path)).problems == []
    assert Cache.open(tmp_path).example(0).targets["hidden"][0].log_probs.shape[1] > 100


@pytest.mark.parametrize("cut", ["tokens", "width"])
def test_an_output_matrix_of_another_shape_is_refused(
    tmp_path, configure, make_model, wordpiece, cut
):
    """Whole and sealed, but not this teacher's: an error of the cache, not of an array."""
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    cache_teachers(configure(tmp_path, teachers_of(model, "causal_lm", ["hidden"])))
    folder = "targets/hidden"
    head = Cache.open(tmp_path).teachers["hidden"].head
    for name in ("head.safetensors", "head.json"):
        (tmp_path / folder / name).unlink()
    weight = head.weight[:-1] if cut == "tokens" else head.weight[:, :-1]
    write_head(open_store(tmp_path), folder, StoredHead(weight, None))
    with pytest.raises(CacheError):
        Cache.open(tmp_path).example(0)


def test_a_new_hidden_teacher_never_makes_the_cache_unreadable(
    tmp_path, configure, make_model, wordpiece, monkeypatch
):
    """Whenever its matrix is written: what was there is readable before its first unit is."""
    model = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    cache_teachers(configure(tmp_path, teachers_of(model, "causal_lm", ["topk"])))

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    teachers = teachers_of(model, "causal_lm", ["topk", "hidden"])
    with monkeypatch.context() as patch:
        patch.setattr(make_unit, "run_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(configure(tmp_path, teachers))
    assert len(Cache.open(tmp_path).example(0).targets["topk"]) == 1


def test_states_never_meet_another_models_matrix(
    tmp_path, configure, make_model, wordpiece, monkeypatch
):
    """A run that ended before its first unit leaves the name free, but not its matrix behind."""
    first = make_model("llama", AUTO["causal_lm"], wordpiece, seed=3, initializer_range=0.3)
    second = make_model("llama", AUTO["causal_lm"], wordpiece, seed=8, initializer_range=0.3)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(make_unit, "run_unit", killed)
        with pytest.raises(KeyboardInterrupt):
            cache_teachers(configure(tmp_path, teachers_of(first, "causal_lm", ["hidden"])))
    cache_teachers(configure(tmp_path, teachers_of(second, "causal_lm", ["hidden"])))
    for target, logits in targets_of(Cache.open(tmp_path), "hidden", second, AUTO["causal_lm"]):
        assert np.abs(target.log_probs - log_softmax(logits)).max() < 0.05
