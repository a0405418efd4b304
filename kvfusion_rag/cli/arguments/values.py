"""Argument types: functions that turn the text of an argument into a value, or say which values are allowed.

argparse calls them while it reads the command line, so every value is checked before a command starts to work.
"""

from __future__ import annotations

import ipaddress
import math
import re
import shlex
from argparse import ArgumentTypeError
from collections.abc import Callable
from decimal import Decimal
from functools import wraps
from typing import TYPE_CHECKING, Literal, TypeVar

from ...errors import InvalidInputError
from ...schema import FocusChoice

if TYPE_CHECKING:
    from ...cluster.options import Replicas

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
SHOWN_CHARACTERS = 80  # of a wrong value that a message shows
MAX_DIGITS = 20

T = TypeVar("T")


def argument(read: Callable[[str], T]) -> Callable[[str], T]:
    """Return ``read`` as an argument type: the parser puts the option's name in front of its InvalidInputError."""

    @wraps(read)
    def convert(text: str) -> T:
        try:
            return read(text)
        except InvalidInputError as error:
            raise ArgumentTypeError(f"{str(error).rstrip('.'):.{SHOWN_CHARACTERS * 5}}") from error

    return convert


def shown(text: str) -> str:
    """Return a wrong value for a message, cut if it is long."""
    return repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "...")


# Numbers


def whole(least: int, most: int = MAX_COUNT) -> Callable[[str], int]:
    """Return the type of whole numbers from ``least`` to ``most``."""

    def read(text: str) -> int:
        if not text.isdecimal() or len(text) > MAX_DIGITS or not least <= int(text) <= most:
            raise ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most:,}")
        return int(text)

    return read


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """Return the type of finite numbers from ``least`` to ``most``."""
    allowed = f"from {least:g}" if most == math.inf else f"from {least:g} to {most:g}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or not least <= value <= most:
            raise ArgumentTypeError(f"{shown(text)} is not a number {allowed}")
        return value

    return read


positive = whole(1)
count = whole(0)
seed = whole(0, MAX_SEED)
share = number(0, 1)


def focus(text: str) -> FocusChoice:
    """Read a number of documents from 1, auto, or none for all of them."""
    if text in ("auto", "none"):
        return "auto" if text == "auto" else None
    try:
        return positive(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{shown(text)} is not a number of documents from 1, auto or none") from error


def min_support(text: str) -> float | Literal["auto"]:
    """Read a support from 0 to 1, or auto."""
    if text == "auto":
        return "auto"
    try:
        return share(text)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{shown(text)} is not a number from 0 to 1, or auto") from error


def byte_count(text: str) -> int:
    """Read a size such as 2GiB, 500MB or 1000000."""
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?) *(?:([KMGT]?)(i?)B)?", text, re.IGNORECASE)
    size = 0
    if found is not None:
        amount, letter, binary = found.groups(default="")
        size = int(Decimal(amount) * (1024 if binary else 1000) ** " KMGT".index(letter.upper() or " "))
    if not 1 <= size <= MAX_SEED:
        raise ArgumentTypeError(f"{shown(text)} is not a size from 1 byte such as 2GiB, 500MB or 1000000")
    return size


def verbosity(text: str) -> int:
    """Read how much is reported: -1 (only errors), 0, 1 (each step) or 2 (details)."""
    if text not in ("-1", "0", "1", "2"):
        raise ArgumentTypeError(f"{shown(text)} is not -1 (only errors), 0, 1 (each step) or 2 (details)")
    return int(text)


# Texts


def plain_text(value: str) -> str:
    """Read a text that is not blank."""
    if not value.strip():
        raise ArgumentTypeError(f"{shown(value)} is blank, but it must contain text")
    if re.search("[\ud800-\udfff]", value):
        raise ArgumentTypeError(f"{shown(value)} contains bytes that are not UTF-8")
    return value


def arguments(value: str) -> list[str]:
    """Read the arguments of another command, divided like those of a shell."""
    try:
        found = shlex.split(plain_text(value))
    except ValueError as error:
        raise ArgumentTypeError(f"{shown(value)} cannot be divided into arguments: {error}") from error
    return found


def variable_name(value: str) -> str:
    """Read the name of an environment variable. Another text is not shown, because it may be the secret itself."""
    if not re.fullmatch(r"[A-Za-z_]\w*", value, re.ASCII):
        raise ArgumentTypeError("the value is not the name of an environment variable (letters, digits and _)")
    return value


def ip_address(value: str) -> str:
    """Read an IP address. A name or a network is not one, because the server compares addresses."""
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ArgumentTypeError(f"{shown(value)} is not an IP address, such as 127.0.0.1") from None


def stop(value: str) -> str:
    """Read a text that ends an answer, which may be blank but not empty."""
    return value if value.isspace() else plain_text(value)


def names(value: str) -> list[str]:
    """Read names that are separated by commas."""
    found = [name.strip() for name in plain_text(value).split(",") if name.strip()]
    if not found:
        raise ArgumentTypeError("no name is given")
    return found


@argument
def namespace(value: str) -> str:
    """Read the name of a namespace, which may be empty."""
    if value:
        from ...store import require_namespace  # imports torch

        require_namespace(value)
    return value


@argument
def ray_address(value: str) -> str:
    """Read the address of a Ray cluster: auto or HOST:PORT."""
    from ...cluster.options import require_address  # imports torch

    require_address(value)
    return value


@argument
def replicas(value: str) -> Replicas:
    """Read a number of replicas, or the least and the most, such as 1:8."""
    from ...cluster.options import Replicas  # imports torch

    return Replicas.read(value)


@argument
def device(value: str) -> str:
    """Read the name of a device that this machine has."""
    from ...model.hardware import choose_device  # imports torch

    choose_device(plain_text(value))
    return value
