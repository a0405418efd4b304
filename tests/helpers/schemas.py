"""Random JSON schemas, all of whose values are short enough for a random model to complete."""

from __future__ import annotations

import random
from typing import Any


def random_schema(seed: int) -> dict[str, Any]:
    """Return an object schema."""
    return _object(random.Random(seed), depth=0)


def _object(dice: random.Random, depth: int) -> dict[str, Any]:
    names = dice.sample(["a", "b c", "größe", 'quo"te', "items", "properties", "x_1", "enum"], dice.randint(1, 3))
    schema: dict[str, Any] = {"type": "object", "properties": {name: _any(dice, depth + 1) for name in names}}
    if required := [name for name in names if dice.random() < 0.7]:
        schema["required"] = required
    if dice.random() < 0.3:
        schema["additionalProperties"] = False
    return schema


def _any(dice: random.Random, depth: int) -> dict[str, Any]:
    leaves = [_string, _integer, _number, _enum, lambda dice: {"type": "boolean"}, lambda dice: {"type": "null"}]
    if depth >= 3 or dice.random() < 0.6:
        return dice.choice(leaves)(dice)
    kind = dice.choice(["object", "array", "anyOf", "tuple"])
    if kind == "object":
        return _object(dice, depth)
    if kind == "array":
        return {"type": "array", "items": _any(dice, depth + 1), "minItems": dice.randint(0, 1), "maxItems": 2}
    if kind == "tuple":
        parts = [_any(dice, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
    return {"anyOf": [_any(dice, depth + 1), {"type": "null"}]}


def _string(dice: random.Random) -> dict[str, Any]:
    return dice.choice([
        {"type": "string", "maxLength": 6},
        {"type": "string", "minLength": 2, "maxLength": 3},
        {"type": "string", "pattern": "^[a-z]{1,4}-[0-9]{2}$"},
        {"type": "string", "format": "date"},
    ])  # fmt: skip


def _integer(dice: random.Random) -> dict[str, Any]:
    low = dice.randint(-50, 50)
    return {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 500)}


def _number(dice: random.Random) -> dict[str, Any]:
    return {"enum": [dice.randint(0, 9) / 4, dice.randint(10, 20)]}


def _enum(dice: random.Random) -> dict[str, Any]:
    return dice.choice([{"enum": ["red", "green", 're"d', None]}, {"const": {"k": [1, "two"]}}, {"const": "東京"}])
