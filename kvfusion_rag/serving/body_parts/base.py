"""The base class of the objects in request bodies. Everything in a body is untrusted."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

MAX_FIELDS = 64  # per object

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def well_formed(value: object) -> object:
    return _LONE_SURROGATE.sub("\ufffd", value) if isinstance(value, str) else value


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value


Text = Annotated[str, BeforeValidator(well_formed)]


class Body(BaseModel):
    """A JSON object. As in OpenAI's API, null means that a field is absent, except for fields in ``NULLABLE``.

    As in JSON Schema, a number without a fraction is an integer, even if it is written as 5.0.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    NULLABLE: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _normalized(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        if len(value) > MAX_FIELDS:  # each unknown field would be an error of its own
            raise ValueError(f"an object has {len(value)} fields, but at most {MAX_FIELDS} are allowed")
        return {k: _whole(v) for k, v in value.items() if v is not None or k in cls.NULLABLE}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Return the schema that clients see, in which every optional or unknown field may be null."""
        shown = handler(schema)
        fields = handler.resolve_ref_schema(shown)
        fields["additionalProperties"] = {"type": "null"}
        for name in fields["properties"].keys() - set(fields.get("required", ())):
            field = fields["properties"][name]
            if {"type": "null"} not in field.get("anyOf", ()):
                fields["properties"][name] = {"anyOf": [field, {"type": "null"}]}
        return shown
