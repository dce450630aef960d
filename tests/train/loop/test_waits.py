"""A step given to a device waits for nothing that the device must say."""

import pytest

from testlib.loop import ALL, run, train_config

STEPS = 4
FOUND = {"method": "replaced_tokens", "teacher": "big"}
CAUSAL = [{"teachers": ["lm"], "temperature": 2.0}, {"teachers": ["sense"]}]


@pytest.mark.parametrize(
    ("world", "distill", "student", "values"),
    [
        ("masked_world", ALL, {}, {}),
        ("masked_world", ALL, {}, {"micro_batch_sequences": 4}),
        ("masked_world", ALL, {}, {"log_gradients_every": 1}),
        ("masked_world", ALL, {"domain_prompts": True}, {"log_gradients_every": 1}),
        ("masked_world", [], {}, {"log_gradients_every": 1, "objective": {"methods": [FOUND]}}),
        ("causal_world", CAUSAL, {}, {"log_gradients_every": 1}),  # padded batches
        ("causal_world", CAUSAL, {}, {"batch_sequences": 1}),  # full ones
        ("causal_world", CAUSAL, {"domain_prompts": True}, {}),
    ],
)
def test_a_step_reads_nothing_from_its_device(
    request, tmp_path, reads_of_steps, world, distill, student, values
):
    world = request.getfixturevalue(world)
    config = train_config(
        distill, **{"steps": STEPS, "evaluate_every": 9, "log_gradients_every": None} | values
    )
    run(world, tmp_path / "run", config, student=student)
    assert [inside for _, inside in reads_of_steps] == [{}] * STEPS
    # what was left by the step before is read outside it, once
    assert [before for before, _ in reads_of_steps[1:]] == [{}, {"tolist": 1}, {"tolist": 1}]


def test_nor_does_a_ranking_of_several_parts(masked_world, tmp_path, reads_of_steps):
    """But for the sums of the expert's own scores, which are the host's."""
    ranking = {"group": "domain", "listwise": 0.5}
    term = {"teachers": ["score"], "ranking": ranking}
    config = train_config([term], steps=STEPS, evaluate_every=9, micro_batch_sequences=4)
    run(masked_world, tmp_path / "run", config)
    assert [inside for _, inside in reads_of_steps] == [{"tolist": 1}] * STEPS
