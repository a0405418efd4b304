"""Finds and reads ``kvfusion.toml``. Its sections are ``[global]``, ``[COMMAND]`` and ``[COMMAND.ACTION]``."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from platformdirs import user_config_path

from ...errors import InvalidInputError

FILE_NAME = "kvfusion.toml"
NO_FILE = "none"
GLOBAL = "global"
MAX_BYTES = 1 << 20

Command = tuple[str, ...]  # the words of a command; none of them for all commands


@dataclass(frozen=True, slots=True)
class SettingsFile:
    """A file with settings, none of them checked except for their names.

    Attributes:
        shown: path as it is shown to the user.
        sections: values by the command to which they belong, and by the name of the option.
    """

    shown: str
    sections: Mapping[Command, Mapping[str, Any]]


def find_files(chosen: Path | str | None) -> list[Path]:
    """Return the files to read: the chosen one, or those in the current folder and of the user, the nearer first."""
    if chosen is not None:
        return [] if chosen == NO_FILE else [Path(chosen)]
    candidates = (Path(FILE_NAME), user_config_path("kvfusion-rag", appauthor=False) / FILE_NAME)
    return [path for path in candidates if path.is_file()]


def read_file(path: Path, known: Mapping[Command, set[str]]) -> SettingsFile:
    """Read a file whose sections and keys must be ``known``: the names of the options of each command.

    Raises:
        InvalidInputError: the file cannot be read, or contains an unknown section or key.
    """
    shown = str(path)
    sections: dict[Command, dict[str, Any]] = {}
    for name, table in _load(path, shown).items():
        command = () if name == GLOBAL else (name,)
        if not isinstance(table, dict):
            raise InvalidInputError(f"{shown}: {name!r} is in no section; write it below [{GLOBAL}] or a command.")
        if command not in known:
            commands = [GLOBAL, *(words[0] for words in known if len(words) == 1)]
            raise InvalidInputError(f"{shown}: there is no command for the section [{name}]{nearest(name, commands)}")
        sections[command] = {}
        for key, value in table.items():
            action = (*command, key)
            if isinstance(value, dict) and action in known:
                _require_keys(shown, action, value, known)
                sections[action] = value
            else:
                _require_keys(shown, command, {key: value}, known)
                sections[command][key] = value
    return SettingsFile(shown, sections)


def section_name(command: Command) -> str:
    """Return the section of a command as it is written in a file."""
    return f"[{'.'.join(command) or GLOBAL}]"


def nearest(name: str, names: list[str]) -> str:
    """Return the end of a sentence: a question with the most similar of ``names``, or a full stop."""
    found = get_close_matches(name, names, 1)
    return f"; did you mean {found[0]!r}?" if found else "."


def _load(path: Path, shown: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInputError(f"the configuration {shown!r} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_BYTES:
        raise InvalidInputError(f"the configuration {shown!r} has more than {MAX_BYTES:,} bytes.")
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # includes TOMLDecodeError and UnicodeDecodeError
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise InvalidInputError(f"the configuration {shown!r} is not a TOML file: {reason}.") from error


def _require_keys(
    shown: str, command: Command, table: Mapping[str, object], known: Mapping[Command, set[str]]
) -> None:
    """Reject unknown names of options. Their values are not shown, because they may be secret."""
    for key in table:
        if key not in known[command]:
            owner = f"an option of kvfusion {' '.join(command)}" if command else "an option of any command"
            hint = nearest(key, sorted(known[command]))
            raise InvalidInputError(f"{shown}: {key!r} in {section_name(command)} is not {owner}{hint}")
