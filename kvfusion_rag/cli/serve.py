"""Serve answers over HTTP with OpenAI's chat completions API, and a page for browsers.

With ``--docs``, questions without documents of their own are answered from these files. Without it, every request
contains its documents.

By default only this machine can send requests. With another ``--host``, clients need an API key. The server stops on
SIGTERM (exit code 0) or Ctrl-C within ten seconds. Requests in progress have five of them to finish. With --ray,
replicas on a Ray cluster answer, and SIGHUP makes them load the model again without losing a request.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import ClusterError, InvalidInputError
from .arguments.cluster import add_replica_arguments, cluster_of
from .arguments.keys import key_of_environment
from .arguments.library import add_library_arguments, check_library, has_library, open_library
from .arguments.paths import existing_file
from .arguments.values import byte_count, ip_address, plain_text, positive, variable_name, whole
from .console import print_error, say, say_json
from .options import (
    add_focus,
    add_min_support,
    add_model_arguments,
    add_model_name,
    add_reasoning_limit,
    add_store_arguments,
    generator_spec,
    index_folder,
    load_generator,
    require_store,
)

if TYPE_CHECKING:
    import socket

    from .. import KVFusionGenerator
    from ..cluster import ClusterOptions, GeneratorSpec
    from ..cluster.serving import Deployment
    from ..serving import Access, ServingOptions
    from ..serving.library import Library

STOP_SECONDS = 9.0  # after a signal, the process ends even if a pass of the model or an upload has not ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    add_model_arguments(parser)
    add_library_arguments(parser)
    add_store_arguments(parser)
    add_replica_arguments(parser)
    parser.add_argument(
        "--mode",
        choices=["auto", "fusion", "concat", "ape"],
        help="mode of requests that do not set one (default: the model's own)",
    )
    add_focus(parser, " for requests that do not set focus")
    add_min_support(parser, ", in requests that do not set min_support")
    add_reasoning_limit(parser, " for requests that do not set it")
    parser.add_argument(
        "--host",
        type=plain_text,
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address to listen on (default: 127.0.0.1, this machine only)",
    )
    parser.add_argument(
        "--port",
        type=whole(0, 65535),
        default=8000,
        metavar="N",
        help="port to listen on, 0 for a free one (default: 8000)",
    )
    parser.add_argument(
        "--served-model-name",
        nargs="+",
        type=plain_text,
        default=[],
        metavar="NAME",
        help="names of the model in requests; answers report the first one (default: the model's own name)",
    )
    _add_access_arguments(parser)
    _add_limits(parser)
    parser.add_argument("--metrics", action="store_true", help="serve Prometheus metrics at /metrics")


def _add_access_arguments(parser: argparse.ArgumentParser) -> None:
    """Add who may use the server, and from where."""
    parser.add_argument(
        "--api-key-env",
        type=variable_name,
        metavar="NAME",
        help="environment variable with the API key (default: none)",
    )
    parser.add_argument(
        "--api-keys-file",
        type=existing_file,
        metavar="FILE",
        help='JSON file with API keys: {"key": "namespace", ...} (default: none)',
    )
    parser.add_argument(
        "--allow-unauthenticated", action="store_true", help="let other machines send requests without an API key"
    )
    for option, metavar, text in (
        ("--allowed-host", "NAME", "host name of this server"),
        ("--allowed-origin", "URL", "origin of web pages that may send requests (CORS)"),
    ):
        parser.add_argument(
            option,
            action="append",
            type=plain_text,
            default=[],
            metavar=metavar,
            help=f"{text}; may be repeated (default: none)",
        )

    parser.add_argument(
        "--trusted-proxy",
        action="append",
        type=ip_address,
        default=[],
        metavar="IP",
        help="address of a TLS proxy whose X-Forwarded-Proto is trusted; may be repeated (default: none)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add what one tenant, one request and all requests together may take."""
    parser.add_argument(
        "--store-namespace-bytes",
        type=byte_count,
        metavar="SIZE",
        help="maximum bytes of one namespace in the store, such as 2GiB; with it, a tenant cannot evict the documents "
        "of another (default: no limit)",
    )
    parser.add_argument(
        "--tenant-concurrency",
        type=positive,
        metavar="N",
        help="maximum number of requests in progress in one namespace (default: half of --max-concurrency if the keys "
        "have several namespaces)",
    )
    for option, default, metavar, text in (
        ("--max-concurrency", 64, "N", "maximum number of requests in progress"),
        ("--max-body-mib", 4, "N", "maximum size of a request body in MiB"),
        ("--max-documents", 256, "N", "maximum number of documents in a request"),
        ("--timeout", 600, "SECONDS", "maximum time of a request in seconds"),
    ):
        parser.add_argument(
            option, type=positive, default=default, metavar=metavar, help=f"{text} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    from ..serving import ServingOptions, bind, require_guarded

    require_store(args)
    check_library(args)
    access = _access(args)
    if not args.allow_unauthenticated:
        require_guarded(args.host, access)
    options = ServingOptions(
        mode=args.mode,
        focus=args.focus,
        max_concurrency=args.max_concurrency,
        tenant_concurrency=args.tenant_concurrency,
        max_body_bytes=args.max_body_mib << 20,
        max_documents=args.max_documents,
        timeout=args.timeout,
        metrics=args.metrics,
        model_names=tuple(args.served_model_name),
    )
    cluster = cluster_of(args)
    if cluster is not None and has_library(args):
        raise InvalidInputError(
            "--ray cannot be combined with --docs, --index or --uploads, because replicas have no files; send the "
            "documents with each request."
        )
    with bind(args.host, args.port) as listener:  # first, so that a port in use is reported before a model is loaded
        if cluster is None:
            _serve_here(args, access, options, listener)
        else:
            _serve_on_cluster(args, access, options, listener, cluster)
    return 0


def _serve_here(args: argparse.Namespace, access: Access, options: ServingOptions, listener: socket.socket) -> None:
    from ..serving import create_app, serve

    generator = load_generator(args)
    try:
        with (
            open_library(args, generator) as library,
            _short_turns(),
            _for_ask(args, generator, library, access, options),
        ):
            app = create_app(generator, access=access, options=options, library=library)
            name = options.names_of(generator.model_id)[0]
            serve(app, listener, lambda url: _say_ready(args, url, name), _end_soon, args.trusted_proxy)
    finally:
        if generator.store is not None:
            generator.store.close()  # finishes uploads and saves when documents were last used


@contextmanager
def _for_ask(
    args: argparse.Namespace,
    generator: KVFusionGenerator,
    library: Library | None,
    access: Access,
    options: ServingOptions,
) -> Generator[None, None, None]:
    """Let ``kvfusion ask`` of the same user get its answers here, if the server has files of its own."""
    if library is None or not (args.docs or args.index):
        yield
        return
    from ..serving import running_on
    from ..serving.library.asking import create_ask_app
    from .same_user.listening import private_listener
    from .same_user.place import socket_place

    with private_listener(socket_place(args, index_folder(args))) as listener:
        if listener is None:
            yield
            return
        with running_on(listener, create_ask_app(generator, library, access, options)):
            yield


def _serve_on_cluster(
    args: argparse.Namespace, access: Access, options: ServingOptions, listener: socket.socket, cluster: ClusterOptions
) -> None:
    from ..cluster.connection import load_serve
    from ..cluster.serving import deployed
    from ..serving import serve

    load_serve()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # its import has set another level; restored by the command
    spec = generator_spec(args)
    with (
        deployed(spec, access=access, options=options, cluster=cluster, replicas=args.replicas) as deployment,
        _updating_on_hangup(deployment, spec),
    ):
        ready = partial(_say_ready, args, model_id=deployment.model_id)
        serve(deployment.app, listener, ready, _end_soon, args.trusted_proxy)


@contextmanager
def _updating_on_hangup(deployment: Deployment, spec: GeneratorSpec) -> Generator[None, None, None]:
    """Replace the replicas when the process receives SIGHUP."""

    def update() -> None:
        try:
            deployment.update(spec)
        except ClusterError as error:
            print_error(str(error))
        else:
            print("the replicas were replaced", file=sys.stderr, flush=True)

    def start(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=update, name="kvfusion-update", daemon=True).start()

    former = signal.signal(signal.SIGHUP, start)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, former)


@contextmanager
def _short_turns() -> Generator[None, None, None]:
    """Let Python's threads take shorter turns."""
    from ..serving.options import SWITCH_SECONDS

    former = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(former)


def _access(args: argparse.Namespace) -> Access:
    from ..serving import Access, read_keys

    keys = read_keys(args.api_keys_file) if args.api_keys_file is not None else {}
    key = key_of_environment(args.api_key_env)
    if key is not None:
        if key in keys:
            raise InvalidInputError(
                f"the key of the environment variable {args.api_key_env!r} is also in {str(args.api_keys_file)!r}, so "
                "its namespace is ambiguous; remove it from one of them."
            )
        keys[key] = None
    return Access(keys, hosts=args.allowed_host, origins=args.allowed_origin)


def _end_soon(number: int) -> None:
    """End the process in ``STOP_SECONDS``, whatever its threads are computing.

    The store stays whole: a document that is being written is complete afterwards or absent.
    """

    def end() -> None:
        print(f"stopped after {STOP_SECONDS:g} s; work in progress was not finished", file=sys.stderr, flush=True)
        os._exit(0 if number == signal.SIGTERM else 130)

    timer = threading.Timer(STOP_SECONDS, end)
    timer.daemon = True
    timer.start()


def _say_ready(args: argparse.Namespace, url: str, model_id: str) -> None:
    if args.json:
        say_json({"url": url, "model": model_id})
    else:
        say(f"serving {model_id} at {url}/v1, with a page at {url} (stop with Ctrl-C)")
