"""Function calling of `KVFusionLlamaIndexLLM`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, ChatResponse, MessageRole, ToolCallBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.core.llms.utils import parse_partial_json
from llama_index.core.program.function_program import FunctionCallingProgram
from llama_index.core.tools.types import BaseTool

from kvfusion_rag import InvalidInputError, Tool


class FunctionCalling(FunctionCallingLLM):
    """What LlamaIndex's function-calling methods (`chat_with_tools`, `predict_and_call`, ...) need of an LLM."""

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `chat`. `tool_choice` is "auto", "none", "required" or the name of a tool."""
        message = ChatMessage(role=MessageRole.USER, content=user_msg) if isinstance(user_msg, str) else user_msg
        messages = [*(chat_history or []), *([] if message is None else [message])]
        if not tools:
            return {"messages": messages, **kwargs}
        form = {
            "tools": [_to_tool(tool) for tool in tools],
            "tool_choice": tool_choice or ("required" if tool_required else "auto"),
            "parallel_tool_calls": allow_parallel_tool_calls,
        }
        return {"messages": messages, **form, **kwargs}

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """Return the calls in a response, also those that a stream or a limit has cut.

        Raises InvalidInputError if there are none, unless `error_on_no_tool_call` is False.
        """
        blocks = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not blocks and error_on_no_tool_call:
            raise InvalidInputError(
                f"the answer {(response.message.content or '')[:80]!r} calls no tool; pass tool_required=True to "
                "force a call."
            )
        return [
            ToolSelection(tool_id=block.tool_call_id or "", tool_name=block.tool_name, tool_kwargs=_arguments(block))
            for block in blocks
        ]

    def _structured_stream_call(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        if not self.metadata.is_function_calling_model:
            return super()._structured_stream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return self._program(output_cls, prompt).stream_call(llm_kwargs=llm_kwargs, **prompt_args)

    async def _structured_astream_call(
        self, output_cls: Any, prompt: Any, llm_kwargs: dict[str, Any] | None = None, **prompt_args: Any
    ) -> Any:
        if not self.metadata.is_function_calling_model:
            return await super()._structured_astream_call(output_cls, prompt, llm_kwargs, **prompt_args)
        return await self._program(output_cls, prompt).astream_call(llm_kwargs=llm_kwargs, **prompt_args)

    def _program(self, output_cls: Any, prompt: Any) -> FunctionCallingProgram[Any]:
        """Return a program that must call its tool. LlamaIndex's own may stream text instead."""
        return FunctionCallingProgram.from_defaults(
            output_cls=output_cls, prompt=prompt, llm=self, tool_choice="required"
        )


def _to_tool(tool: BaseTool) -> Tool:
    function = tool.metadata.to_openai_tool(skip_length_check=True)["function"]
    return Tool(function["name"], function.get("description") or "", function.get("parameters") or {})


def _arguments(block: ToolCallBlock) -> dict[str, Any]:
    if not isinstance(block.tool_kwargs, str):
        return block.tool_kwargs
    try:
        found = parse_partial_json(block.tool_kwargs)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
