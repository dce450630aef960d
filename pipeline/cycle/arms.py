"""The arms of a cycle: what each is, which student it needs, and which arms coincide."""

from collections.abc import Mapping
from typing import Literal

Arm = Literal["expert", "start", "longer", "mlm", "pseudo", "kd", "both", "committee", "mixture"]
ARMS: dict[Arm, str] = {
    "expert": "the start model, fine-tuned: the teacher, and the arm to beat",
    "start": "the model that students start from, fine-tuned, if experts are of another one",
    "longer": "the start model, fine-tuned for twice the epochs",
    "mlm": "pre-trained further on the text with masked LM alone, fine-tuned",
    "pseudo": "on the same text with the class that the expert finds most likely, as a label",
    "kd": "on the same text with the task's expert alone, fine-tuned",
    "both": "with masked LM and the task's expert (UEGP), fine-tuned",
    "committee": "on the same text with all seeds of the task's expert together, fine-tuned",
    "mixture": "with masked LM and the experts of all tasks (MoEGP), fine-tuned",
}
DEFAULT_ARMS: tuple[Arm, ...] = ("expert", "longer", "mlm", "kd", "both", "mixture")
# Arms that may coincide with another one, with that one and the reason to leave them out then.
TWINS: Mapping[Arm, tuple[Arm, str]] = {
    "mixture": ("both", "with one task it is the same student as both"),
    "start": ("expert", "experts are of the same model, so that it is expert again"),
    "committee": ("kd", "its teachers are those of kd"),
}
UNTAUGHT: tuple[Arm, ...] = ("expert", "start", "longer")  # a fine-tuned model, without a student
WITH_TEACHERS: tuple[Arm, ...] = ("pseudo", "kd", "committee", "both", "mixture")
GUIDED: tuple[Arm, ...] = tuple(arm for arm in WITH_TEACHERS if arm != "pseudo")  # by probabilities
MASKED: tuple[Arm, ...] = ("mlm", "both", "mixture")  # arms whose students learn masked LM
# Arms whose students have one expert each, and therefore one student per task.
OF_ONE_EXPERT: tuple[Arm, ...] = tuple(arm for arm in WITH_TEACHERS if arm != "mixture")
# The longest chain first; shorter jobs fill the free places meanwhile.
ORDER: tuple[Arm, ...] = (*WITH_TEACHERS[::-1], "mlm", "longer", "start")
