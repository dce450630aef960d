"""device_map: auto, of accelerate; on one device the bytes are those of a run without it."""

import logging

import pytest

from rekindle.data.errors import InputError
from rekindle.pipeline.caching.cache_teachers import cache_teachers
from rekindle.pipeline.caching.model_parallel import check_spread
from testlib.caches import committed


def test_a_teacher_is_spread_over_the_devices_that_there_are(tmp_path, configure, make_teacher):
    teachers = [
        make_teacher("lm", "causal_lm", targets={"kind": "topk", "k": 8}),
        make_teacher("masked", "masked_lm"),
        make_teacher("expert", "sequence_classification"),
    ]
    cache_teachers(configure(tmp_path / "plain", teachers))
    spread = [teacher | {"device_map": "auto"} for teacher in teachers]
    cache_teachers(configure(tmp_path / "spread", spread))
    assert committed(tmp_path / "spread") == committed(tmp_path / "plain")


def test_an_output_matrix_without_a_place_is_refused(tmp_path, make_teacher, caplog):
    """Blocks may be moved in and out for each pass; the matrix is read outside of them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = make_teacher("lm", "causal_lm", config={"tie_word_embeddings": False})["model"]
    places = {"model": "cpu", "lm_head": "disk"}
    spread = AutoModelForCausalLM.from_pretrained(
        model, device_map=places, offload_folder=str(tmp_path)
    )
    with caplog.at_level(logging.INFO, "rekindle"), pytest.raises(InputError, match="no room"):
        check_spread(spread, "teacher 'lm'")
    assert "teacher 'lm': spread over cpu, disk (device_map)" in caplog.text
    assert torch.isfinite(spread(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()
