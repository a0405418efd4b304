"""Turns a value of a file or environment variable into the value of an option, with the types of the command line."""

from __future__ import annotations

import argparse
import json
import re
from difflib import get_close_matches
from typing import Any

from ...errors import InvalidInputError
from ...machine.secrets import without_password
from ..arguments.values import shown

FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def read_value(action: argparse.Action, value: Any, where: str) -> Any:
    """Return the value that a file gives an option.

    Args:
        where: place of the value, for messages.

    Raises:
        InvalidInputError: the option does not allow this value.
    """
    try:
        if _is_flag(action):
            if not isinstance(value, bool):
                raise argparse.ArgumentTypeError(f"{_text(value)!r} is not true or false")
            return value
        if _takes_several(action):
            if not isinstance(value, list):
                raise argparse.ArgumentTypeError(f"{shown(_text(value))} is not a list of values, such as [...]")
            return [_read_one(action, one) for one in value]
        return _read_one(action, value)
    except argparse.ArgumentTypeError as error:
        raise InvalidInputError(without_password(f"{where}: {error}.")) from error


def read_text(action: argparse.Action, text: str, where: str) -> Any:
    """Return the value that an environment variable gives an option. Several values are a list in JSON.

    Raises:
        InvalidInputError: the option does not allow this value.
    """
    try:
        if _is_flag(action):
            if text.lower() not in FLAGS:
                raise argparse.ArgumentTypeError(f"{shown(text)} is not one of {', '.join(FLAGS)}")
            return FLAGS[text.lower()]
        if _takes_several(action):
            return [_convert(action, one) for one in _list(text)]
        return _convert(action, text)
    except argparse.ArgumentTypeError as error:
        raise InvalidInputError(without_password(f"{where}: {error}.")) from error


def _is_flag(action: argparse.Action) -> bool:
    return action.nargs == 0 and action.type is None


def _takes_several(action: argparse.Action) -> bool:
    return action.nargs == "+" or isinstance(action, argparse._AppendAction)


def _read_one(action: argparse.Action, value: Any) -> Any:
    """Return one value. A number must be a number in the file, too, and a text a text."""
    if isinstance(value, list | dict):
        raise argparse.ArgumentTypeError(f"{shown(_text(value))} is not a single value")
    found = _convert(action, _text(value))
    if not isinstance(value, str) and isinstance(found, str):
        raise argparse.ArgumentTypeError(f"{_text(value)} is not a text in quotation marks")
    is_number = isinstance(found, int | float)
    if isinstance(value, str) and is_number and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{shown(value)} is not a number; remove the quotation marks")
    return found


def _convert(action: argparse.Action, text: str) -> Any:
    if "\0" in text:  # which command lines cannot contain
        raise argparse.ArgumentTypeError(f"{shown(text)} contains a null character")
    if action.choices is not None:
        choices = [str(choice) for choice in action.choices]
        if text not in choices:
            found = get_close_matches(text, choices, 1)
            hint = f"; did you mean {found[0]!r}" if found else ""
            raise argparse.ArgumentTypeError(f"{shown(text)} is not one of {', '.join(choices)}{hint}")
        return text
    assert callable(action.type), "every option with a value has a type"
    return action.type(text)


def _list(text: str) -> list[str]:
    """Return the texts of a JSON list, or ``text`` itself as the only one."""
    if not text.lstrip().startswith("["):
        return [text]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if found is None or not all(isinstance(one, str) for one in found):
        raise argparse.ArgumentTypeError(f'{shown(text)} is not a list of texts in JSON, such as ["a", "b"]')
    return found


def _text(value: Any) -> str:
    """Return a value of a TOML file as it would be written on the command line."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
