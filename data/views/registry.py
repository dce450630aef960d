"""All kinds of views, by how the recorded names of views begin."""

from rekindle.data.views.base import View
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.pairs import PairView


class Clean(View):
    """The tokens of the corpus, all of them."""

    kind = "clean"
    tasks = ("masked_lm", "causal_lm")


class Text(View):
    """The text of the corpus, in the tokens of whom it is shown to."""

    kind = "text"
    tasks = ("sequence_classification", "regression", "token_classification")


VIEWS: dict[str, type[View]] = {view.kind: view for view in (Clean, Text, MaskedView, PairView)}


def view_kind(name: str) -> type[View]:
    """Return the kind of the view whose recorded name that is."""
    return VIEWS.get(name.partition("-")[0], View)
