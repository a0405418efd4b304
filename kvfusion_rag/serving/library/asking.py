"""The app that answers ``kvfusion ask`` from a running server's files, for the user who runs the server.

It must be served where no other user can connect. It reads changed files before each question and calls the generator
as the command does, so the answer is that of a command which loads the model itself. Uploaded files are not searched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from pydantic import Field

from ...errors import RetrievalError
from ...generator import KVFusionGenerator
from ...retrieval import IndexReport
from ...schema import Answer, AnswerPiece, Document, ModeChoice
from ..access import Access
from ..admission import Load
from ..app import Tenants, add_limits, bare_app
from ..bodies import Focus
from ..body_parts.base import Body, Text
from ..errors import ApiError, Reply
from ..options import ServingOptions
from ..streams import answer_events, in_thread
from .library import Library


class AskRequest(Body):
    """A question, with the options of ``kvfusion ask`` that do not change what the server has loaded."""

    NULLABLE: ClassVar[frozenset[str]] = frozenset({"focus"})

    question: Text
    top_k: int = Field(ge=1)
    mode: ModeChoice | None = None
    focus: Focus
    max_new_tokens: int | None = None
    temperature: float
    seed: int | None = None
    stop: list[Text]
    stream: bool

    def answer_arguments(self) -> dict[str, Any]:
        """Return the arguments of ``KVFusionGenerator.answer`` except the documents."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ("top_k", "stream")}


def create_ask_app(generator: KVFusionGenerator, library: Library, access: Access, options: ServingOptions) -> FastAPI:
    """Create an ASGI app with the path ``/ask``, which returns :class:`Asked` as an object or a stream.

    Args:
        generator, library: those of the server. The app does not close them.
        access: keys of the server. Requests need one of them if there are any.
        options: limits of requests. The defaults of mode and focus are not used.
    """
    app, tenants = bare_app(options), Tenants(generator, access.namespaces)

    @app.post("/ask")
    async def ask(body: AskRequest, request: Request) -> Response:
        """Answer a question from the server's own files, as they are now."""
        tenant = tenants.of(request)
        try:
            update = await in_thread(library.update)
            documents = await in_thread(library.search_own, body.question, body.top_k)
        except RetrievalError as error:  # the user's own files, so their paths are not secret
            raise ApiError(400, str(error), "retrieval_failed") from error
        asked = Asked(update, documents, tenant.identity())
        arguments = {**body.answer_arguments(), "documents": documents}
        if body.stream:
            return await answer_events(tenant, arguments, asked)
        answer = await tenant.aanswer(**arguments)
        return Reply({**asked.first(), **asked.last(answer)[0]})

    add_limits(app, access, options, Load())
    return app


@dataclass(frozen=True, slots=True)
class Asked:
    """The JSON objects of one answer: what changed in the files, pieces of the answer, and then everything else."""

    update: IndexReport | None
    documents: Sequence[Document]
    model: dict[str, str | int | None]

    def first(self) -> dict[str, Any]:
        return {"update": None if self.update is None else self.update.to_dict()}

    def piece(self, piece: AnswerPiece) -> dict[str, Any]:
        return {"piece": asdict(piece)}

    def last(self, answer: Answer) -> list[dict[str, Any]]:
        documents = [asdict(document) for document in self.documents]
        return [{"answer": answer.to_dict(), "documents": documents, "model": self.model}]
