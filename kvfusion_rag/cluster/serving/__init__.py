"""The server of many replicas on a Ray cluster. Needs the extras ``ray`` and ``serve``.

HTTP requests come in at the ingress, which is the app of the single server without a model: it checks keys and limits,
and gives each request to the replica that had its documents before. Ray Serve runs the replicas. This room must not
know how answers are computed or how requests are read: both are code of the single server.
"""

from __future__ import annotations

from ..options import ClusterOptions, Replicas
from ..spec import GeneratorSpec
from .deployment import Deployment, deployed

__all__ = ["ClusterOptions", "Deployment", "GeneratorSpec", "Replicas", "deployed"]
