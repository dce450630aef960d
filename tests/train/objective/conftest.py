"""The setting of a case."""

import pytest

from testlib.objective.cases import WORLDS
from testlib.objective.setting import Setting


@pytest.fixture
def setting_of(request):
    """setting_of(world, name of an objective, batch=…) -> the Setting."""

    def make(world, name, **more):
        return Setting(request.getfixturevalue(world), WORLDS[world][name], **more)

    return make
