"""A real cluster of several nodes on this machine, and what its processes are made to do."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rekindle.pipeline.processes import handing_out

STORE = 80 << 20  # bytes, of each node: results are small
PATIENCE = 120  # seconds for a node to join


@pytest.fixture(scope="session")
def cluster() -> Iterator[Any]:
    """A head without room for work; nodes are added by the tests."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    os.environ |= {"RAY_memory_monitor_refresh_ms": "0"}  # a full machine has its actors killed
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE}
    found = Cluster(initialize_head=True, head_node_args=head)
    yield found
    found.shutdown()


@pytest.fixture
def nodes(cluster: Any) -> Iterator[Callable[..., Any]]:
    """nodes(**resources) -> a new node of one CPU; all are removed at the end.

    Ray's own half a minute is not enough on a loaded machine, and a node may die as it begins.
    """
    added = []

    def add(**more: Any) -> Any:
        for last in (False, True):
            settings = {"num_cpus": 1, "object_store_memory": STORE} | more
            node = cluster.add_node(wait=False, **settings)
            try:
                cluster._wait_for_node(node, timeout=PATIENCE)
            except TimeoutError:
                cluster.remove_node(node, allow_graceful=False)
                if last:
                    raise
            else:
                break
        added.append(node)
        return node

    yield add
    for node in added:
        if node in cluster.worker_nodes:
            cluster.remove_node(node, allow_graceful=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where units leave a word of what they did."""
    (tmp_path / "words").mkdir()
    return tmp_path / "words"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room on the cluster is looked for often."""
    monkeypatch.setattr(handing_out, "ROOM_CHECK_SECONDS", 0.2)
