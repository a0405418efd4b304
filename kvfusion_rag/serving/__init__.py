"""An OpenAI-compatible HTTP service around one generator; needs the extra ``serve``.

``create_app`` makes the ASGI app, ``serve`` runs it until it is told to stop, ``running`` in a thread of its own.
"""

from __future__ import annotations

from ..errors import MissingDependencyError

try:
    import fastapi as _fastapi  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as error:
    raise MissingDependencyError('a server needs fastapi and uvicorn: pip install "kvfusion-rag[serve]".') from error

from .access import Access, read_keys
from .app import create_app
from .options import ServingOptions
from .server import bind, require_guarded, running, serve

__all__ = ["Access", "ServingOptions", "bind", "create_app", "read_keys", "require_guarded", "running", "serve"]
