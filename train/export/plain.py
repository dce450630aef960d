"""A student's body with one of its heads, as the model of transformers' class of its family.

Our head (``TaskHead``) fits if the family's own head is a dense layer, tanh and a linear layer on
the first token, as in BERT and RoBERTa. The tensors are identified by their shapes, and running
both shows whether they mean the same.
"""

from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from rekindle.data.errors import InputError, first_words
from rekindle.train.model.adapter import whole_shapes_of
from rekindle.train.model.family_head import (
    SAME,
    FamilyHead,
    auto_class,
    difference,
    head_config,
    sample_inputs,
)
from rekindle.train.model.labels import check_label_names, output_tensors, problem_of_outputs
from rekindle.train.model.network import HeadConfig, StudentNetwork, TaskHead, head_key
from rekindle.train.model.sight import BROKEN, evaluating
from rekindle.train.objective.label_union import bare_names

# By family: what a configuration must contain for the family's head to be a dense layer and tanh.
AS_OURS: dict[str, dict[str, object]] = {
    "deberta": {"pooler_hidden_act": "tanh"},
    "deberta-v2": {"pooler_hidden_act": "tanh"},
    "mobilebert": {"classifier_activation": True},
}
TRIED = (3, 5)  # number of texts, tokens of each
EMBEDDING = "embedding"  # the problem of a head that gives vectors
ANY_PADDING = 0  # an id to try a head with if neither it nor the model names one


def plain_model(student: StudentNetwork, name: str) -> PreTrainedModel:
    """Return a model of the family's class with the student's body and its head ``name``, in
    float32 on the CPU; its logits are the head's.

    Raises InputError, with the reason and advice, for a head that has no place in the family.
    """
    import transformers

    if problem := not_exportable(student, name):
        raise InputError(problem)
    head, own = student.head_configs[name], _as_family(student, name)
    config = head_config(own.frame.config, head.num_labels, None)
    names = plain_labels(name, head)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}
    config.problem_type = problem_of(head) if head.kind == "sequence" else None
    made: PreTrainedModel = getattr(transformers, auto_class(config, head.judges)).from_config(
        config, dtype=torch.float32
    )
    body = student.model.base_model.state_dict()
    weights = {f"{made.base_model_prefix}.{name}": values for name, values in body.items()}
    known = made.state_dict().keys()
    weights = {name: values for name, values in weights.items() if name in known}
    made.load_state_dict(weights | own.frame.state_dict())
    if (apart := distance(student, name, made)) > SAME:
        raise InputError(
            f"the head {name!r} cannot be exported: the logits of {type(made).__name__} with its "
            f"weights differ from its own by {apart:.2g}"
        )
    return made.eval()


# By model: a run asks before it begins, and again when the student is written. Independent of
# weights.
_ANSWERS: WeakKeyDictionary[nn.Module, dict[tuple[str, str], str | None]] = WeakKeyDictionary()


def not_exportable(student: StudentNetwork, name: str) -> str | None:
    """Return why the head ``name`` cannot be exported and what to do; None if it can be.

    Weights are neither read nor run.
    """
    known = _ANSWERS.setdefault(student.model, {})
    key = (name, repr((student.head_configs[name], student.prompts is None, student.task)))
    if key not in known:
        known[key] = _not_exportable(student, name)
    return known[key]


def _not_exportable(student: StudentNetwork, name: str) -> str | None:
    head, model = student.head_configs[name], student.model
    if student.prompts is not None:
        return (
            f"the head {name!r} cannot be exported: the student has domain prompts, a vector "
            "after each text's first token, which plain transformers does not insert. Train one "
            "without student.domain_prompts"
        )
    if head.form == "family" or head.kind == "embedding":
        return None
    sizes = (head.judges, head.num_labels, head.padding or ANY_PADDING)
    try:
        place_of_ours(student, head)
    except (InputError, *BROKEN) as error:
        told = f"the head {name!r} cannot be exported: {first_words(error, 200)}"
        try:
            FamilyHead.fresh(model, *sizes, causal=student.task == "causal_lm")
        except (InputError, *BROKEN) as worse:
            why = first_words(worse, 200)
            return f"{told}; nor does its family have a head of its own that could be ({why})"
        return (
            f"{told}. Train a student with `student.head: family`, whose heads are those of "
            f"{model.config.model_type}: `pipeline train-student RUN.yaml --set student.head=family"
            " --out DIR`; every one of them can be exported"
        )
    return None


def place_of_ours(student: StudentNetwork, head: HeadConfig) -> tuple[FamilyHead, dict[str, str]]:
    """Return the family's head, and the name of its tensor for each of our head's tensors.

    Raises InputError, with the reason, if it is another function of the states.
    """
    model = student.model
    settings = AS_OURS.get(model.config.model_type, {})
    padding = head.padding or ANY_PADDING
    made = FamilyHead.fresh(model, head.judges, head.num_labels, padding, settings=settings)
    frame = made.frame
    outputs = set(output_tensors(frame.config, auto_class(frame.config, head.judges)))
    body = {f"{frame.base_model_prefix}.{name}" for name in whole_shapes_of(model.base_model)}
    shapes = {name: tuple(values.shape) for name, values in frame.state_dict().items()}
    ours = TaskHead(model.config.get_text_config().hidden_size, head.num_labels, 0.0)
    dense = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if shape == tuple(ours.dense.weight.shape) and name not in outputs
    }
    dense = {name for name in dense if f"{name}.weight" not in body} or dense
    place = {f"dense.{part}": f"{name}.{part}" for name in dense for part in ("weight", "bias")}
    place |= {f"out.{name.rpartition('.')[2]}": name for name in outputs}
    rest = shapes.keys() - body - set(place.values())
    wrong = InputError(
        f"{type(frame).__name__} has no place for a dense layer, tanh and a linear layer on "
        f"{_pooled(student, head)}"
    )
    if len(dense) != 1 or rest or place.keys() != ours.state_dict().keys():
        raise wrong
    if not all(
        shapes.get(theirs) == ours.state_dict()[name].shape for name, theirs in place.items()
    ):
        raise wrong
    states = torch.randn(*TRIED, ours.dense.in_features, generator=torch.Generator().manual_seed(0))
    ids = sample_inputs(frame.config)["input_ids"][:, :1].repeat(1, TRIED[1])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(made), evaluating(ours):
        fill(made, ours, place)
        pooled = states if head.kind == "token" else student._pool(states, inputs["attention_mask"])
        if difference(made(states, inputs), ours(pooled)) > SAME:
            raise wrong
    return made, place


def fill(made: FamilyHead, ours: TaskHead, place: dict[str, str]) -> None:
    """Give a family's head the weights of ours."""
    weights = {place[name]: values for name, values in ours.state_dict().items()}
    made.frame.load_state_dict(weights, strict=False)


def _as_family(student: StudentNetwork, name: str) -> FamilyHead:
    """Return the head ``name`` as its family has it."""
    head, own = student.head_configs[name], student.heads[head_key(name)]
    if isinstance(own, FamilyHead):
        return own
    assert isinstance(own, TaskHead)
    made, place = place_of_ours(student, head)
    fill(made, own, place)
    return made


@torch.no_grad()
def distance(student: StudentNetwork, name: str, model: PreTrainedModel) -> float:
    """Return how far ``model``'s logits are from the head ``name``'s, tried on a few rows."""
    head, inputs = student.head_configs[name], sample_inputs(model.config)
    device = next(student.parameters()).device
    here = {key: values.to(device) for key, values in inputs.items()}
    places = inputs["attention_mask"].flatten().nonzero()[:, 0]
    with evaluating(student), evaluating(model):
        logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits.cpu().float()
        if head.kind == "token":
            own = student(here, token_heads={name: places.to(device)}).logits[name]
            logits = logits.flatten(0, 1)[places]
        else:
            own = student(here, sequence_heads=[name]).logits[name]
    return difference(logits, own.cpu().float())


def plain_labels(name: str, head: HeadConfig) -> tuple[str, ...]:
    """Return the names of a head's outputs; for a union, without the experts' names if still
    distinct.

    Raises InputError if two are the same.
    """
    names = head.label_names or tuple(f"LABEL_{number}" for number in range(head.num_labels))
    bare = bare_names(names, name.split("+"))
    found = bare if len(set(bare)) == len(bare) else names
    check_label_names(found, f"the head {name!r}")
    return found


def problem_of(head: HeadConfig) -> str:
    """Return the kind of task that a head answers, as transformers names it."""
    if head.kind == "embedding":
        return EMBEDDING
    if head.kind == "token":
        return "token_classification"
    return problem_of_outputs(head.problem, head.num_labels)


def _pooled(student: StudentNetwork, head: HeadConfig) -> str:
    if head.kind == "token":
        return "each token"
    return "the first token" if student.task == "masked_lm" else "the last token"
