"""The divergences by name, and what each asks of a target. Imports nothing, so that it is cheap.

KL(q‖p) is linear in q up to a term without the student: in the mean over samples of q, each an
unbiased estimate, it teaches q itself. The others are not: an id that was not drawn would count as
one that the teacher rules out, and their minimum is elsewhere than at q.
"""

SKEWED = "skew_kl"
LINEAR = {"forward_kl": True, "reverse_kl": False, "jsd": False, "tvd": False, SKEWED: False}
DIVERGENCES = tuple(LINEAR)
EVERY_LINEAR = tuple(name for name, linear in LINEAR.items() if linear)
SKEW = 0.1  # α of skew_kl where none is given: that of its paper


def skew_of(divergence: str, given: float | None) -> float:
    """Return α of KL(q ‖ αq + (1−α)p); of None the usual one.

    Raises ValueError for one outside (0, 1), and for one that is given to another divergence.
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
            "there is nothing of the student in it)"
        )
    return given
