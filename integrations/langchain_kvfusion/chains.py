"""create_kvfusion_documents_chain: the documents chain for people who use ``create_stuff_documents_chain``.

Joins a KVFusionPrompt, a model and a parser. Knows no retriever and no generator.
"""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import LanguageModelLike
from langchain_core.output_parsers import BaseOutputParser, StrOutputParser
from langchain_core.prompts import BasePromptTemplate, PromptTemplate
from langchain_core.runnables import Runnable

from kvfusion_rag import InvalidInputError

from .prompts import KVFusionPrompt

_TEMPLATE = "Answer the question from these documents, as briefly as you can.\n\n{%s}\n\nQuestion: {input}\nAnswer:"


def create_kvfusion_documents_chain(
    llm: LanguageModelLike,
    prompt: BasePromptTemplate | None = None,
    *,
    output_parser: BaseOutputParser | None = None,
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """A chain that answers from a list of documents, each read apart; also for ``create_retrieval_chain``.

    Args:
        llm: a KVFusionLLM, also one with bound options or fallbacks.
        prompt: any template that shows the documents' variable, or a KVFusionPrompt; by default one with
            ``context`` and ``input``, the names that ``create_retrieval_chain`` fills.
        output_parser: by default the answer stays a string.
        document_variable_name: the input that holds the documents.

    Raises:
        InvalidInputError: the template has no variable of that name.
    """
    if prompt is None:
        prompt = PromptTemplate.from_template(_TEMPLATE % document_variable_name)
    if not isinstance(prompt, KVFusionPrompt):
        prompt = KVFusionPrompt.from_prompt(prompt, document_variable_name)
    if prompt.documents_key != document_variable_name:
        raise InvalidInputError(
            f"document_variable_name is {document_variable_name!r}, but the KVFusionPrompt's documents_key is "
            f"{prompt.documents_key!r}; give both the same name."
        )
    chain = prompt | llm | (output_parser or StrOutputParser())
    return chain.with_config(run_name="kvfusion_documents_chain")
