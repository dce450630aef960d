"""The divergences by name, and what each requires of a target. Imports nothing, to stay cheap.

KL(q‖p) is linear in q up to a term without the student. Trained on samples that are unbiased
estimates of q, it therefore learns q itself. The other divergences are not linear: they treat an id
that was not drawn as one that the teacher rules out, and have their minimum elsewhere than at q.
"""

SKEWED = "skew_kl"
LINEAR = {"forward_kl": True, "reverse_kl": False, "jsd": False, "tvd": False, SKEWED: False}
DIVERGENCES = tuple(LINEAR)
LINEAR_DIVERGENCES = tuple(name for name, linear in LINEAR.items() if linear)
SKEW = 0.1  # α of skew_kl if none is given: the paper's value


def skew_of(divergence: str, given: float | None) -> float:
    """Return α of KL(q ‖ αq + (1−α)p), or the default if ``given`` is None.

    Raises ValueError if it is outside (0, 1) or given with another divergence.
    """
    if given is None:
        return SKEW
    if divergence != SKEWED:
        raise ValueError(
            f"skew is for divergence: {SKEWED}, not {divergence}; leave skew: {given:g} out"
        )
    if not 0 < given < 1:
        raise ValueError(
            f"skew is {given:g}; it must lie between 0 and 1 (at 0 it would be forward_kl, at 1 "
            "the student would not appear in it)"
        )
    return given
