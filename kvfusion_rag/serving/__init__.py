"""An OpenAI-compatible HTTP server for one generator. Needs the extra ``serve``.

HTTP requests come in: chat completions with documents, and documents to prefill or remove. JSON replies and streams of
server-sent events go out. This room checks keys, limits and request bodies and formats replies. It must not know how
answers are computed: it calls only public methods of ``KVFusionGenerator``.
"""

from __future__ import annotations

from ..errors import MissingDependencyError

try:
    import fastapi as _fastapi  # noqa: F401
    import uvicorn as _uvicorn  # noqa: F401
except ImportError as error:
    raise MissingDependencyError.of_extra("the server", str(error.name), "serve") from error

from .access import Access, read_keys
from .app import create_app
from .options import ServingOptions
from .server import bind, require_guarded, running, running_on, serve

__all__ = [
    "Access", "ServingOptions", "bind", "create_app", "read_keys", "require_guarded", "running", "running_on", "serve",
]  # fmt: skip
