"""Errors of a cluster that cannot be started."""

from __future__ import annotations

from typing import Any

import pytest

from kvfusion_rag import ClusterError
from kvfusion_rag.cluster import ClusterOptions, connection


class SlowRay:
    """A Ray that does not find a cluster, and cannot start one."""

    def is_initialized(self) -> bool:
        return False

    def init(self, address: str, **options: Any) -> None:
        if address == "auto":
            raise ConnectionError("no cluster")
        raise Exception("The current node timed out during startup.")  # as Ray raises it


def test_cluster_that_does_not_start_is_an_error_of_ours(monkeypatch):
    monkeypatch.setattr(connection, "load_ray", SlowRay)
    with (
        pytest.raises(ClusterError, match="the cluster 'auto' cannot be used: The current node timed out"),
        connection.connected(ClusterOptions()),
    ):
        pass
