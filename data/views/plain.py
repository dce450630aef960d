"""The views of the unmasked corpus: nothing is stored."""

from rekindle.data.views.base import View


class Clean(View):
    """The tokens of the corpus, all of them."""

    kind = "clean"
    tasks = ("masked_lm", "causal_lm")


class Text(View):
    """The text of the corpus, tokenised by the model that sees it."""

    kind = "text"
    tasks = ("sequence_classification", "regression", "token_classification", "embedding")
