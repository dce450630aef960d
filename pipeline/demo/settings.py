"""How large the demo is and how its models are trained: one place, two sizes."""

from typing import Any

from rekindle.data.settings import Settings
from rekindle.pipeline.demo.tasks import TaskSizes

LM = "base-lm"  # the base model as a masked-LM teacher
WITHOUT, WITH = "without-kd", "with-kd"
STUDENTS = (WITHOUT, WITH)

# One layer, and weights that start larger than BERT's 0.02: it learns most in a minute on a core.
_MODEL = {
    "hidden_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "initializer_range": 0.06,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
}
_DISTILL = [
    {"teachers": ["part", "kind"], "weight": 1.0},
    {"teachers": ["next"], "weight": 1.0},  # a term of its own: it is shown pairs
]


class DemoSettings(Settings):
    """What a demo is made of. The students, and all that is fine-tuned, are trained alike."""

    name: str
    vocabulary: int
    documents: int | None = None  # of the unlabelled corpus, at most
    sizes: TaskSizes
    base: dict[str, Any]  # of the `train` section
    student: dict[str, Any]  # likewise
    seeds: int  # fine-tunings of each model on each task
    finetune: dict[str, Any]
    distill: list[dict[str, Any]]
    model: dict[str, Any]
    sequence_length: int = 48
    batch_sequences: int = 32
    replicas: int
    lm_targets: int = 16  # candidates kept of the masked-LM teacher
    pairs: str = "same-document"
    seed: int = 0


FULL = DemoSettings(
    name="full",
    model=_MODEL,
    distill=_DISTILL,
    vocabulary=4000,
    replicas=3,
    sizes=TaskSizes(train=800, dev=240, test=1440),
    base={"steps": 1200, "learning_rate": 2e-3, "evaluate_every": 400},
    student={"steps": 800, "learning_rate": 2e-3, "warmup_steps": 50, "evaluate_every": 80},
    seeds=3,
    finetune={"epochs": 8, "batch_size": 16, "learning_rate": 1e-3},
)
QUICK = DemoSettings(
    name="quick",
    model=_MODEL,
    distill=_DISTILL,
    vocabulary=2000,
    documents=1500,
    replicas=2,
    sizes=TaskSizes(train=320, dev=80, test=400),
    base={"steps": 160, "learning_rate": 2e-3, "warmup_steps": 40, "evaluate_every": 160},
    student={"steps": 80, "learning_rate": 2e-3, "warmup_steps": 20, "evaluate_every": 20},
    seeds=1,
    finetune={"epochs": 5, "batch_size": 16, "learning_rate": 1e-3},
)
