"""A hub that is asked by huggingface_hub's own client, and things to send to it."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testlib.servers.hub_double import HubDouble

TOKEN = "hf_write0123456789"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """The double is the hub, with a token that may write, and a cache of its own for downloads."""
    import fsspec
    from huggingface_hub import HfFileSystem, constants

    from rekindle.data.storage.client import client_of

    double = HubDouble()
    monkeypatch.setattr(constants, "ENDPOINT", double.url)
    url = double.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("REKINDLE_COPIES", str(tmp_path / "copies"))
    HfFileSystem.clear_instance_cache()
    client_of.cache_clear()
    assert fsspec is not None
    yield double
    double.close()


@pytest.fixture
def everything_said(caplog: pytest.LogCaptureFixture) -> Any:
    """All that is logged, by whomever, however small."""
    caplog.set_level(logging.DEBUG)
    return caplog
