"""Which teachers share a forward pass: entries of one model that keep different targets.

Each stays a teacher of its own, with its name, files and commits; the results of a pass are scored
for each of them. Only language models keep several kinds of target, so only they share.
"""

from collections.abc import Hashable, Sequence

from rekindle.pipeline.caching.teachers import TeacherPlan

Group = tuple[TeacherPlan, ...]


def group_by_pass(parts: Sequence[TeacherPlan]) -> list[Group]:
    """Group the parts of teachers by the forward pass they need, in the order of the first of each;
    no two parts in a group belong to one teacher.
    """
    groups: dict[Hashable, list[TeacherPlan]] = {}
    for number, part in enumerate(parts):
        key = pass_key(part)
        group = groups.get(key, []) if key is not None else []
        if key is None or part.info.name in {other.info.name for other in group}:
            key = number
        groups.setdefault(key, []).append(part)
    return [tuple(group) for group in groups.values()]


def pass_key(plan: TeacherPlan) -> Hashable | None:
    """Return everything that decides a language model's forward passes over a corpus, batches
    included; None for parts that share with nobody: task experts, tails (they belong to ids already
    stored), and models that a server runs.
    """
    info, config = plan.info, plan.config
    if not config.vocabulary or info.extends is not None or config.served is not None:
        return None
    fingerprints = tuple(sorted(info.fingerprints.items()))
    settings = (info.task, info.view, info.domains, info.precision, info.vocabulary_size)
    return (plan.directory, fingerprints, config.batch_tokens, info.mapped, *settings)


def describe_shared_pass(group: Group) -> str:
    """Return the sentence that the teachers of a group share their passes."""
    names, first = ", ".join(plan.info.name for plan in group), group[0].info
    return (
        f"teachers {names}: one forward pass of {first.model} for all of them (the same model, "
        f"view and precision: {first.precision})"
    )
