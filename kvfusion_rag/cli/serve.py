"""Answer over HTTP, as OpenAI's chat completions do, with documents in each request.

Only this machine can ask unless ``--host`` says otherwise, and then only with an API key. Ends on SIGTERM (exit
code 0) or Ctrl-C; requests under way may end first.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from ..errors import InvalidInputError
from .console import say, say_json
from .options import (
    add_focus,
    add_model_arguments,
    add_model_name,
    add_store_arguments,
    count,
    load_generator,
    positive,
    require_store,
)

if TYPE_CHECKING:
    from ..serving import Access


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_name(parser)
    add_model_arguments(parser)
    add_store_arguments(parser)
    parser.add_argument("--mode", choices=["auto", "fusion", "concat", "ape"], help="of requests that name none")
    add_focus(parser, " for requests that name none")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: this machine alone)")
    parser.add_argument("--port", type=count, default=8000, metavar="N", help="default: 8000; 0 for any free one")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    parser.add_argument("--api-keys-file", metavar="FILE", help='JSON file of API keys: {"key": "namespace", ...}')
    parser.add_argument(
        "--allow-unauthenticated", action="store_true", help="let other machines in without an API key"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="name of this server; may be repeated"
    )
    parser.add_argument(
        "--allowed-origin", action="append", default=[], metavar="URL", help="web page's origin that may ask (CORS)"
    )
    parser.add_argument(
        "--max-concurrency", type=positive, default=64, metavar="N", help="requests at once (default: 64)"
    )
    parser.add_argument(
        "--max-body-mib", type=positive, default=4, metavar="N", help="longest body in MiB (default: 4)"
    )
    parser.add_argument(
        "--max-documents", type=positive, default=256, metavar="N", help="documents of a request (default: 256)"
    )
    parser.add_argument(
        "--timeout", type=positive, default=600, metavar="SECONDS", help="longest request (default: 600)"
    )
    parser.add_argument("--metrics", action="store_true", help="counts for Prometheus at /metrics")


def run(args: argparse.Namespace) -> int:
    from ..serving import ServingOptions, bind, create_app, require_guarded, serve

    require_store(args)
    access = _access(args)
    if not args.allow_unauthenticated:
        require_guarded(args.host, access)
    options = ServingOptions(
        mode=args.mode,
        focus=args.focus,
        max_concurrency=args.max_concurrency,
        max_body_bytes=args.max_body_mib << 20,
        max_documents=args.max_documents,
        timeout=args.timeout,
        metrics=args.metrics,
    )
    with bind(args.host, args.port) as listener:  # a port that is taken is known before a model is loaded
        generator = load_generator(args)
        try:
            app = create_app(generator, access=access, options=options)
            serve(app, listener, lambda url: _say_ready(args, url, generator.model_id))
        finally:
            if generator.store is not None:
                generator.store.close()  # ends uploads, and notes which documents were used
    return 0


def _access(args: argparse.Namespace) -> Access:
    from ..serving import Access, read_keys

    keys = read_keys(args.api_keys_file) if args.api_keys_file is not None else {}
    if args.api_key_env is not None:
        key = os.environ.get(args.api_key_env, "")
        if not key:
            raise InvalidInputError(f"the environment variable {args.api_key_env!r} holds no API key; set it first.")
        keys[key] = None
    return Access(keys, hosts=args.allowed_host, origins=args.allowed_origin)


def _say_ready(args: argparse.Namespace, url: str, model_id: str) -> None:
    if args.json:
        say_json({"url": url, "model": model_id})
    else:
        say(f"serving {model_id} at {url}/v1 (Ctrl-C ends it)")
