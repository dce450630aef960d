"""What is said of a student's language-model head that begins afresh, before it is trained."""

import math

from rekindle.train.step_config import usual_head_steps


def told_of_fresh_head(model: str, vocabulary: int, steps: int, taught: str = "") -> str:
    """Say what it means to train a fresh head over ``vocabulary`` tokens, and what to do instead.

    ``steps``: of the run; 0: not known yet. ``taught``: by whom, if not by the text.
    """
    alone = str(usual_head_steps(steps)) if steps else "N, a fifth of the steps, at most 100"
    return (
        f"student {model!r} has no language-model head: a fresh one, with random weights, "
        f"is trained{taught}. Its cross-entropy begins near {math.log(vocabulary):.1f} nats (a "
        f"guess among {vocabulary:,} tokens), where a teacher's divergence is about 1: at first "
        "the loss, and most of the gradient that reaches the body, are this head's learning. "
        f"Either train it alone at first (train.warm_head_steps: {alone}), "
        "or, where its words do not matter, leave the text out (train.objective.hard.weight: 0)"
    )
