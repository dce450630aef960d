"""The divergences by name, and what each asks of a target. Imports nothing, so that it is cheap.

KL(q‖p) is linear in q up to a term without the student: in the mean over samples of q, each an
unbiased estimate, it teaches q itself. The others are not: an id that was not drawn would count as
one that the teacher rules out, and their minimum is elsewhere than at q.
"""

LINEAR = {"forward_kl": True, "reverse_kl": False, "jsd": False, "tvd": False}
DIVERGENCES = tuple(LINEAR)
EVERY_LINEAR = tuple(name for name, linear in LINEAR.items() if linear)
