"""All kinds of views, by how the recorded names of views begin."""

from rekindle.data.views.base import View
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.pairs import PairView
from rekindle.data.views.plain import Clean, Text

VIEWS: dict[str, type[View]] = {view.kind: view for view in (Clean, Text, MaskedView, PairView)}


def view_kind(name: str) -> type[View]:
    """Return the kind of the view whose recorded name that is."""
    return VIEWS.get(name.partition("-")[0], View)
