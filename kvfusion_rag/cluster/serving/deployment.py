"""Deploys replicas with Ray Serve, which starts, scales, replaces and stops them, and chooses one for each request."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
import uuid
from collections.abc import AsyncGenerator, Collection, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from fastapi import FastAPI
from starlette.types import Message

from ...errors import ClusterError
from ...serving import Access, ServingOptions
from ...serving.options import SWITCH_SECONDS
from ..connection import connected, load_serve, require_shared_store, workers_of
from ..options import ClusterOptions, Replicas
from ..spec import GeneratorSpec, WorkerCache
from .ingress import ReplicaLostError, create_ingress
from .replica import Forwarded, Replica

if TYPE_CHECKING:
    from .metrics import Family

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
HEALTH_SECONDS = 2.0  # until Ray Serve notices that a replica has died
REPLY_SECONDS = 60.0  # for all replicas to remove documents
METRICS_SECONDS = 5.0


@contextmanager
def deployed(
    generator: GeneratorSpec,
    *,
    access: Access | None = None,
    options: ServingOptions | None = None,
    cluster: ClusterOptions | None = None,
    replicas: Replicas | None = None,
    name: str | None = None,
) -> Generator[Deployment, None, None]:
    """Return a context in which replicas answer on a Ray cluster.

    ``deployment.app`` is an ASGI app with the API of ``serving.create_app``. Serve it with ``serving.running`` or
    ``serving.serve``.

    Args:
        generator: model and store of each replica.
        access: which clients may send requests. By default all clients that reach the server, but no web pages.
        options: limits; ``max_concurrency`` is that of one replica.
        cluster: where the replicas run, and their threads and GPUs. Default: the cluster of this machine, or a new
            one that ends with the context. Its ``workers`` are not used.
        replicas: how many. Default: as many as the cluster has CPUs or GPUs for.
        name: name of the application in Ray Serve, in place of one that exists. Default: a new name, so that several
            servers can share a cluster.

    Raises:
        MissingDependencyError: Ray or a package that Ray Serve needs is not installed.
        ClusterError: the cluster cannot be used, or a replica cannot load its generator.
        InvalidInputError: the store is a folder, which only one machine can use, but the cluster has several.
    """
    serve = load_serve()
    cluster, access, options = cluster or ClusterOptions(), access or Access(), options or ServingOptions()
    workers = None if replicas is None else replicas.most + 1  # so that an update can start a new one first
    room = ClusterOptions(cluster.address, workers, cluster.threads, cluster.gpus)
    with connected(room) as ray:
        require_shared_store(ray, generator.store)
        if replicas is None:
            count = workers_of(ray, room)
            replicas = Replicas(count, count)
        name = name or f"kvfusion-{uuid.uuid4().hex[:8]}"
        serve.start(proxy_location="Disabled")  # nothing but our own app listens on a port
        deployment = Deployment(ray, serve, name, replicas, room, access, options)
        try:
            deployment.update(generator)
            yield deployment
        finally:
            serve.delete(name, _blocking=False)


class Deployment:
    """Replicas of one generator, and the app in front of them.

    Attributes:
        app: forwards requests to replicas. It exists after the first :meth:`update`.
    """

    app: FastAPI

    def __init__(
        self, ray: Any, serve: Any, name: str, replicas: Replicas, cluster: ClusterOptions, access: Access,
        options: ServingOptions,
    ) -> None:  # fmt: skip
        self._ray, self._serve, self._name = ray, serve, name
        self._replicas, self._cluster, self._access, self._options = replicas, cluster, access, options
        self._model: dict[str, Any] = {}
        self._updating = threading.Lock()

    @property
    def model_id(self) -> str:
        """Name of the model, as requests have it."""
        return self._model["id"]

    def update(self, generator: GeneratorSpec) -> None:
        """Replace all replicas, a few at a time, by new ones that load ``generator``. No request is lost.

        If the cluster has room for one more, a new replica starts before an old one stops, and the old ones stay if
        the generator cannot be loaded. Without room, requests wait for a new replica if there is no other.

        Raises:
            ClusterError: a replica cannot load the generator.
        """
        with self._updating:
            self._update(generator)

    def _update(self, generator: GeneratorSpec) -> None:
        bound = self._deployment().bind(
            generator.in_this_folder(), self._access.namespaces, self._options, self._cluster.threads
        )
        try:
            handle = self._serve.run(bound, name=self._name, route_prefix=None)
            facts = handle.facts.remote().result()
        except (RuntimeError, self._ray.exceptions.RayError) as error:
            reports = self._serve.status().applications[self._name].deployments.values()
            cause = "\n".join([str(error), *(report.message for report in reports)])
            raise ClusterError(f"the replicas could not start: {_cause(cause)}") from error
        self._model.clear()
        self._model |= facts["model"]
        if not hasattr(self, "app"):
            self.app = create_ingress(
                self._model, facts["schema"], _RayReplicas(self._ray, handle), access=self._access,
                options=self._options, most_replicas=self._replicas.most,
            )  # fmt: skip

    def _has_room(self) -> bool:
        """Return whether a new replica can start before an old one stops."""
        free = self._ray.available_resources()
        return free.get("CPU", 0) >= self._cluster.threads and free.get("GPU", 0) >= self._cluster.gpus

    def _deployment(self) -> Any:
        least, most, each = self._replicas.least, self._replicas.most, self._options.max_concurrency
        if least == most:
            scale: dict[str, Any] = {"num_replicas": least}
        else:
            scale = {
                "autoscaling_config": {
                    "min_replicas": least,
                    "max_replicas": most,
                    "target_ongoing_requests": max(1, each // 2),
                }
            }
        return self._serve.deployment(_Served).options(
            name="replica",
            max_ongoing_requests=each,
            max_queued_requests=-1,  # the ingress limits the requests that can wait
            ray_actor_options={"num_cpus": self._cluster.threads, "num_gpus": self._cluster.gpus},
            health_check_period_s=HEALTH_SECONDS,
            graceful_shutdown_timeout_s=self._options.timeout,
            max_surge_percent=100 if self._has_room() else 0,  # without room, new replicas would wait forever
            max_constructor_retry_count=1,
            request_router_config={"request_router_class": ROUTER},
            logging_config={"enable_access_log": False},
            **scale,
        )


class _Served(Replica):
    """The actor of one replica."""

    def __init__(
        self, spec: GeneratorSpec, namespaces: Collection[str], options: ServingOptions, threads: int
    ) -> None:
        torch.set_num_threads(threads)
        sys.setswitchinterval(SWITCH_SECONDS)
        store = spec.store
        self._cache = WorkerCache(store) if store is not None and "://" in store else None  # locked until the end
        super().__init__(spec.load(self._cache.folder if self._cache else None), namespaces, options)

    def named_metrics(self) -> tuple[str, list[Family]]:
        """Return the id of this replica and its metrics."""
        from ray.serve import get_replica_context  # pyright: ignore[reportMissingImports]

        return get_replica_context().replica_id.unique_id, self.metrics()

    def __del__(self) -> None:
        """Finish uploads. Ray Serve calls this before a replica ends."""
        self.close()


class _RayReplicas:
    """Calls replicas through a handle of Ray Serve. Ray's errors become our own."""

    def __init__(self, ray: Any, handle: Any) -> None:
        self._ray, self._handle = ray, handle

    async def respond(self, request: Forwarded, session: str) -> AsyncGenerator[Message, None]:
        messages = self._handle.options(stream=True, session_id=session).respond.remote(request)
        try:
            async for message in messages:
                yield message
        except self._ray.exceptions.RayTaskError:  # a fault of our own, which another replica has too
            raise
        except (self._ray.exceptions.RayError, self._unavailable) as error:
            raise ReplicaLostError(_cause(error)) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise ReplicaLostError("the replica was stopped") from error  # Ray raises this without cancelling us
        finally:
            messages.cancel()

    async def reply_everywhere(self, request: Forwarded) -> list[list[Message]]:
        found = await self._everywhere("reply", request, seconds=REPLY_SECONDS)
        alive = [one for one in found if not isinstance(one, self._ray.exceptions.ActorDiedError)]
        for one in alive:
            if isinstance(one, BaseException):
                raise ReplicaLostError(_cause(one)) from one
        if not alive:
            raise ReplicaLostError("no replica runs")
        return alive

    async def metrics(self) -> dict[str, list[Family]]:
        found = await self._everywhere("named_metrics", seconds=METRICS_SECONDS)
        return dict(one for one in found if not isinstance(one, BaseException))

    async def _everywhere(self, method: str, *arguments: Any, seconds: float) -> list[Any]:
        try:
            calls = self._handle.broadcast(method, *arguments)
            return await calls.results_async(timeout_s=seconds, return_exceptions=True)
        except (self._ray.exceptions.RayError, self._unavailable, TimeoutError) as error:
            raise ReplicaLostError(_cause(error)) from error

    @property
    def _unavailable(self) -> type[Exception]:
        from ray.serve.exceptions import DeploymentUnavailableError  # pyright: ignore[reportMissingImports]

        return DeploymentUnavailableError


def _cause(error: object) -> str:
    """Return the cause in one line: our own error among those that Ray quotes, or the end of the message."""
    text = str(error)
    own = re.findall(r"^kvfusion_rag\.errors\.\w+: (.+)", text, re.MULTILINE)
    return " ".join((own[-1] if own else text).split())[-500:]
