"""create_kvfusion_documents_chain, a replacement for ``create_stuff_documents_chain``."""

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
    prompt: BasePromptTemplate[Any] | None = None,
    *,
    output_parser: BaseOutputParser[Any] | None = None,
    document_variable_name: str = "context",
) -> Runnable[dict[str, Any], Any]:
    """Create a chain that answers from a list of separate documents, for example for ``create_retrieval_chain``.

    Args:
        llm: a KVFusionLLM or ChatKVFusion, possibly with bound options or fallbacks.
        prompt: a KVFusionPrompt, or any template that contains the documents' variable. The default template has
            ``context`` and ``input``, the variables of ``create_retrieval_chain``.
        output_parser: parser of the answer. By default the answer is a string.
        document_variable_name: name of the variable that contains the documents.

    Raises:
        InvalidInputError: the template does not have this variable.
    """
    if prompt is None:
        prompt = PromptTemplate.from_template(_TEMPLATE % document_variable_name)
    if not isinstance(prompt, KVFusionPrompt):
        prompt = KVFusionPrompt.from_prompt(prompt, document_variable_name)
    if prompt.documents_key != document_variable_name:
        raise InvalidInputError(
            f"document_variable_name is {document_variable_name!r}, but documents_key of the KVFusionPrompt is "
            f"{prompt.documents_key!r}; they must be equal."
        )
    chain = prompt | llm | (output_parser or StrOutputParser())
    return chain.with_config(run_name="kvfusion_documents_chain")
