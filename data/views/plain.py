"""Views that are the corpus itself: nothing is stored."""

from rekindle.data.views.base import View


class Clean(View):
    """All tokens of the corpus."""

    kind = "clean"
    tasks = ("masked_lm", "causal_lm")


class Text(View):
    """The text of the corpus, in the tokens of the model it is shown to."""

    kind = "text"
    tasks = ("sequence_classification", "regression", "token_classification", "embedding")
