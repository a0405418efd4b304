"""Requests that the OpenAPI document allows are answered, others are rejected, and every reply is as documented."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from fuzzing import examples
from hypothesis import HealthCheck, assume, given, settings
from schemathesis import GenerationMode
from tiny import generator

from kvfusion_rag.serving import ServingOptions, create_app

HEADERS = {"host": "localhost"}


def has_distinct_tools(body: Any) -> bool:
    """Whether the names of a valid body's tools differ, which JSON Schema cannot demand."""
    try:
        names = [tool["function"]["name"] for tool in body["tools"]]
        return len(names) == len(set(names))
    except (TypeError, KeyError):
        return True


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_requests_and_replies_conform_to_the_schema(mode):
    app = create_app(generator(), options=ServingOptions())
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, headers=HEADERS)
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/chat/completions", "/v1/documents", "/v1/models", "/health"} <= {one.path for one in operations}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # there is nothing to get wrong

        @settings(examples(60), deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def conforms(case):
            assume(has_distinct_tools(case.body))
            case.call_and_validate(headers=HEADERS)

        conforms()
