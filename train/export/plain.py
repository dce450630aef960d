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
from rekindle.train.model.sight import MODEL_ERRORS, evaluating
from rekindle.train.objective.label_union import bare_names

# By family: what a configuration must contain for the family's head to be a dense layer and tanh.
SAME_HEAD_SETTINGS: dict[str, dict[str, object]] = {
    "deberta": {"pooler_hidden_act": "tanh"},
    "deberta-v2": {"pooler_hidden_act": "tanh"},
    "mobilebert": {"classifier_activation": True},
}
SAMPLE_SHAPE = (3, 5)  # number of texts, tokens of each
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
    head, family_head = student.head_configs[name], _as_family(student, name)
    config = head_config(family_head.frame.config, head.num_labels, None)
    names = plain_labels(name, head)
    config.id2label = dict(enumerate(names))
    config.label2id = {label: number for number, label in enumerate(names)}
    config.problem_type = problem_of(head) if head.kind == "sequence" else None
    plain: PreTrainedModel = getattr(transformers, auto_class(config, head.judges)).from_config(
        config, dtype=torch.float32
    )
    body = student.model.base_model.state_dict()
    weights = {f"{plain.base_model_prefix}.{name}": values for name, values in body.items()}
    names_in_class = plain.state_dict().keys()
    weights = {name: values for name, values in weights.items() if name in names_in_class}
    plain.load_state_dict(weights | family_head.frame.state_dict())
    if (largest_difference := logit_distance(student, name, plain)) > SAME:
        raise InputError(
            f"the head {name!r} cannot be exported: the logits of {type(plain).__name__} with its "
            f"weights differ from its own by {largest_difference:.2g}"
        )
    return plain.eval()


# By model: a run asks before it begins, and again when the student is written. Independent of
# weights.
_ANSWERS: WeakKeyDictionary[nn.Module, dict[tuple[str, str], str | None]] = WeakKeyDictionary()


def not_exportable(student: StudentNetwork, name: str) -> str | None:
    """Return why the head ``name`` cannot be exported and what to do; None if it can be.

    Weights are neither read nor run.
    """
    answers = _ANSWERS.setdefault(student.model, {})
    key = (name, repr((student.head_configs[name], student.prompts is None, student.task)))
    if key not in answers:
        answers[key] = _not_exportable(student, name)
    return answers[key]


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
        matching_family_head(student, head)
    except (InputError, *MODEL_ERRORS) as error:
        problem = f"the head {name!r} cannot be exported: {first_words(error, 200)}"
        try:
            FamilyHead.fresh(model, *sizes, causal=student.task == "causal_lm")
        except (InputError, *MODEL_ERRORS) as family_error:
            reason = first_words(family_error, 200)
            return f"{problem}; nor does its family have a head of its own that could be ({reason})"
        return (
            f"{problem}. Train a student with `student.head: family`, whose heads are those of "
            f"{model.config.model_type}: `pipeline train-student RUN.yaml --set student.head=family"
            " --out DIR`; every one of them can be exported"
        )
    return None


def matching_family_head(
    student: StudentNetwork, head: HeadConfig
) -> tuple[FamilyHead, dict[str, str]]:
    """Return the family's head, and the name of its tensor for each of our head's tensors.

    Raises InputError, with the reason, if it is another function of the states.
    """
    model = student.model
    settings = SAME_HEAD_SETTINGS.get(model.config.model_type, {})
    padding = head.padding or ANY_PADDING
    family_head = FamilyHead.fresh(model, head.judges, head.num_labels, padding, settings=settings)
    frame = family_head.frame
    outputs = set(output_tensors(frame.config, auto_class(frame.config, head.judges)))
    body = {f"{frame.base_model_prefix}.{name}" for name in whole_shapes_of(model.base_model)}
    shapes = {name: tuple(values.shape) for name, values in frame.state_dict().items()}
    own_head = TaskHead(model.config.get_text_config().hidden_size, head.num_labels, 0.0)
    dense_layers = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if shape == tuple(own_head.dense.weight.shape) and name not in outputs
    }
    dense_layers = {name for name in dense_layers if f"{name}.weight" not in body} or dense_layers
    tensor_names = {
        f"dense.{part}": f"{name}.{part}" for name in dense_layers for part in ("weight", "bias")
    }
    tensor_names |= {f"out.{name.rpartition('.')[2]}": name for name in outputs}
    unmatched = shapes.keys() - body - set(tensor_names.values())
    mismatch = InputError(
        f"{type(frame).__name__} has no place for a dense layer, tanh and a linear layer on "
        f"{_describe_read_token(student, head)}"
    )
    if len(dense_layers) != 1 or unmatched or tensor_names.keys() != own_head.state_dict().keys():
        raise mismatch
    if not all(
        shapes.get(family_name) == own_head.state_dict()[name].shape
        for name, family_name in tensor_names.items()
    ):
        raise mismatch
    states = torch.randn(
        *SAMPLE_SHAPE, own_head.dense.in_features, generator=torch.Generator().manual_seed(0)
    )
    ids = sample_inputs(frame.config)["input_ids"][:, :1].repeat(1, SAMPLE_SHAPE[1])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(family_head), evaluating(own_head):
        fill_family_head(family_head, own_head, tensor_names)
        read_states = (
            states if head.kind == "token" else student._pool(states, inputs["attention_mask"])
        )
        if difference(family_head(states, inputs), own_head(read_states)) > SAME:
            raise mismatch
    return family_head, tensor_names


def fill_family_head(
    family_head: FamilyHead, own_head: TaskHead, tensor_names: dict[str, str]
) -> None:
    """Give a family's head the weights of ours."""
    weights = {tensor_names[name]: values for name, values in own_head.state_dict().items()}
    family_head.frame.load_state_dict(weights, strict=False)


def _as_family(student: StudentNetwork, name: str) -> FamilyHead:
    """Return the head ``name`` as its family has it."""
    head, module = student.head_configs[name], student.heads[head_key(name)]
    if isinstance(module, FamilyHead):
        return module
    assert isinstance(module, TaskHead)
    family_head, tensor_names = matching_family_head(student, head)
    fill_family_head(family_head, module, tensor_names)
    return family_head


@torch.no_grad()
def logit_distance(student: StudentNetwork, name: str, model: PreTrainedModel) -> float:
    """Return how far ``model``'s logits are from the head ``name``'s, tried on a few rows."""
    head, inputs = student.head_configs[name], sample_inputs(model.config)
    device = next(student.parameters()).device
    inputs_here = {key: values.to(device) for key, values in inputs.items()}
    places = inputs["attention_mask"].flatten().nonzero()[:, 0]
    with evaluating(student), evaluating(model):
        logits = model(**{k: v.to(model.device) for k, v in inputs.items()}).logits.cpu().float()
        if head.kind == "token":
            head_logits = student(inputs_here, token_heads={name: places.to(device)}).logits[name]
            logits = logits.flatten(0, 1)[places]
        else:
            head_logits = student(inputs_here, sequence_heads=[name]).logits[name]
    return difference(logits, head_logits.cpu().float())


def plain_labels(name: str, head: HeadConfig) -> tuple[str, ...]:
    """Return the names of a head's outputs; for a union, without the experts' names if still
    distinct.

    Raises InputError if two are the same.
    """
    names = head.label_names or tuple(f"LABEL_{number}" for number in range(head.num_labels))
    bare = bare_names(names, name.split("+"))
    labels = bare if len(set(bare)) == len(bare) else names
    check_label_names(labels, f"the head {name!r}")
    return labels


def problem_of(head: HeadConfig) -> str:
    """Return the kind of task that a head answers, as transformers names it."""
    if head.kind == "embedding":
        return EMBEDDING
    if head.kind == "token":
        return "token_classification"
    return problem_of_outputs(head.problem, head.num_labels)


def _describe_read_token(student: StudentNetwork, head: HeadConfig) -> str:
    if head.kind == "token":
        return "each token"
    return "the first token" if student.task == "masked_lm" else "the last token"
