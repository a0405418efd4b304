"""Models whose answers are objects: ``ChatKVFusion.with_structured_output``."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from langchain_core.language_models.base import LanguageModelInput
from langchain_core.output_parsers import BaseOutputParser, JsonOutputParser, PydanticOutputParser
from langchain_core.output_parsers.openai_tools import JsonOutputKeyToolsParser, PydanticToolsParser
from langchain_core.runnables import Runnable, RunnableMap, RunnablePassthrough
from langchain_core.utils.function_calling import convert_to_json_schema, convert_to_openai_tool
from langchain_core.utils.pydantic import is_basemodel_subclass

from kvfusion_rag import InvalidInputError

if TYPE_CHECKING:
    from .chat_model import ChatKVFusion

Method = Literal["json_schema", "function_calling", "json_mode"]
Schema = dict[str, Any] | type


def structured(
    model: ChatKVFusion,
    schema: Schema | None,
    method: Method,
    *,
    include_raw: bool,
    strict: bool | None,
    options: Mapping[str, Any],
) -> Runnable[LanguageModelInput, Any]:
    """Return ``model`` with a format for its answers and a parser of them."""
    if method not in get_args(Method):
        raise InvalidInputError(f"method is {method!r}, but it must be one of {', '.join(get_args(Method))}.")
    if schema is None and method != "json_mode":
        raise InvalidInputError(f"schema is None, but the method {method!r} needs one; only 'json_mode' does not.")
    kwargs = {"method": method} if strict is None else {"method": method, "strict": strict}
    traced = {"kwargs": kwargs, "schema": None if schema is None else convert_to_json_schema(schema)}
    bound: Runnable[LanguageModelInput, Any]
    if method == "function_calling":
        assert schema is not None
        name = convert_to_openai_tool(schema)["function"]["name"]
        bound = model.bind_tools([schema], tool_choice=name, ls_structured_output_format=traced, **options)
        parser = _tool_parser(schema, name)
    else:
        bound = model.bind(
            response_format=_format(schema, method, strict), ls_structured_output_format=traced, **options
        )
        parser = _text_parser(schema)
    return _with_raw(bound, parser) if include_raw else bound | parser


def _format(schema: Schema | None, method: Method, strict: bool | None) -> dict[str, Any]:
    if method == "json_mode" or schema is None:
        return {"type": "json_object"}
    converted = convert_to_json_schema(schema)
    name = converted.get("title", "answer")
    described = {"name": name, "schema": converted, **({} if strict is None else {"strict": strict})}
    return {"type": "json_schema", "json_schema": described}


def _text_parser(schema: Schema | None) -> BaseOutputParser[Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticOutputParser(pydantic_object=cast(Any, schema))
    return JsonOutputParser()


def _tool_parser(schema: Schema, name: str) -> Runnable[Any, Any]:
    if isinstance(schema, type) and is_basemodel_subclass(schema):
        return PydanticToolsParser(tools=[schema], first_tool_only=True)
    return JsonOutputKeyToolsParser(key_name=name, first_tool_only=True)


def _with_raw(bound: Runnable[Any, Any], parser: Runnable[Any, Any]) -> Runnable[LanguageModelInput, Any]:
    """Return the message, the parsed object and the error of parsing together."""
    parsed = RunnablePassthrough.assign(parsed=itemgetter("raw") | parser, parsing_error=lambda _: None)
    failed = RunnablePassthrough.assign(parsed=lambda _: None)
    return RunnableMap(raw=bound) | parsed.with_fallbacks([failed], exception_key="parsing_error")
