"""All kinds of views, by the beginning of their recorded names."""

from rekindle.data.views.base import View
from rekindle.data.views.masked import MaskedView
from rekindle.data.views.pairs import PairView
from rekindle.data.views.plain import Clean, Text

VIEWS: dict[str, type[View]] = {view.kind: view for view in (Clean, Text, MaskedView, PairView)}


def view_kind(name: str) -> type[View]:
    """Return the kind of the view with that recorded name."""
    return VIEWS.get(name.partition("-")[0], View)
