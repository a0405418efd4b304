"""The paths of a library: which files it has, and how a tenant adds and removes its own."""

from __future__ import annotations

from collections.abc import Callable, Generator

from fastapi import FastAPI, Request, Response

from ...generator import KVFusionGenerator
from ...retrieval.loaders import KINDS
from ..api_schema import REPLIES
from ..bodies import RemoveRequest, UploadRequest
from ..document_work import DocumentWork
from ..errors import Reply
from ..streams import in_thread
from .library import Library
from .uploads import Uploads

MAX_LISTED_FILES = 1000
REST_OF_BODY = 1000  # bytes around the content of a file, at most
BASE64_SHARE = 3 / 4  # bytes of a file in a byte of its base64


def add_library(
    app: FastAPI,
    library: Library,
    work: DocumentWork,
    generator_of: Callable[[Request], KVFusionGenerator],
    max_body_bytes: int,
) -> None:
    """Add ``GET /v1/library``, ``POST /v1/library/upload`` and ``POST /v1/library/remove``."""

    @app.get("/v1/library", responses=REPLIES["models"])
    async def contents(request: Request) -> Response:
        """Return the files that answer questions without documents, and what may be uploaded."""
        files = await in_thread(library.files, generator_of(request).namespace)
        return Reply(
            {
                "object": "library",
                "file_count": len(files),
                "files": [{"name": file.name, "uploaded": file.uploaded} for file in files[:MAX_LISTED_FILES]],
                "top_k": library.top_k,
                "watched": library.is_watched,
                "questions": library.questions,
                "uploads": {
                    "max_files": library.max_uploads,
                    "max_bytes": max(0, int((max_body_bytes - REST_OF_BODY) * BASE64_SHARE)),
                    "types": list(KINDS),
                },
            }
        )

    @app.post("/v1/library/upload", responses=REPLIES["work"])
    async def upload(body: UploadRequest, request: Request) -> Response:
        """Keep and index a file, which only this tenant's questions search."""
        uploads = await in_thread(library.uploads_of, generator_of(request).namespace)
        await work.run(request.state.namespace, _adding(uploads, body))
        return Reply({"object": "library.file", "name": body.name, "uploaded": True})

    @app.post("/v1/library/remove", responses=REPLIES["work"])
    async def remove(body: RemoveRequest, request: Request) -> Response:
        """Remove an uploaded file and the KVs of its documents."""
        generator = generator_of(request)
        uploads = await in_thread(library.uploads_of, generator.namespace)
        removed = await work.run(request.state.namespace, _removing(uploads, body.name, generator))
        return Reply({"object": "library.removed", "name": body.name, "removed": removed})


def _adding(uploads: Uploads, body: UploadRequest) -> Generator[None, None, None]:
    uploads.add(body.name, body.content)
    yield


def _removing(uploads: Uploads, name: str, generator: KVFusionGenerator) -> Generator[None, None, int]:
    documents = uploads.remove(name)
    yield
    return (yield from generator.forget_steps(documents))
