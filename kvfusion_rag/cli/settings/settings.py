"""The settings of all options: environment variables first, then files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from ...errors import InvalidInputError
from ...home import HOME_VARIABLE
from ..arguments.paths import settings_file
from .files import Command, SettingsFile, find_files, read_file, section_name
from .readers import read_text, read_value

PREFIX = "KVFUSION_"
FILE_VARIABLE = "KVFUSION_CONFIG"
SIMILAR = 0.75  # a variable whose name is as similar as this to that of an option is a misspelt one


@dataclass(frozen=True, slots=True)
class Setting:
    """The value of an option, and what set it."""

    value: Any
    origin: str


class Settings:
    """What files and environment variables set.

    Args:
        files: the nearest first.
        variables: texts of environment variables by the name of the option.
    """

    def __init__(self, files: Sequence[SettingsFile], variables: Mapping[str, str]) -> None:
        self.files, self.variables = files, variables

    @classmethod
    def load(
        cls, known: Mapping[Command, set[str]], chosen: Path | str | None, environment: Mapping[str, str]
    ) -> Self:
        """Read the files, and check the names of all settings. A value is checked when a command uses it.

        Args:
            known: names of the options of each command.
            chosen: file of the command line, or "none".

        Raises:
            InvalidInputError: a file cannot be read, or a name is unknown.
        """
        if chosen is None and environment.get(FILE_VARIABLE):
            try:
                chosen = settings_file(environment[FILE_VARIABLE])
            except argparse.ArgumentTypeError as error:
                raise InvalidInputError(f"{FILE_VARIABLE}: {error}.") from error
        variables = _variables(known[()], environment)
        return cls([read_file(path, known) for path in find_files(chosen)], variables)

    def find(self, command: Command, action: argparse.Action, name: str) -> Setting | None:
        """Return the setting of an option of ``command``, or None.

        Raises:
            InvalidInputError: the option does not allow the value.
        """
        if name in self.variables:
            variable = variable_of(name)
            return Setting(read_text(action, self.variables[name], variable), variable)
        for file in self.files:
            for length in range(len(command), -1, -1):  # the action, its command, all commands
                section = command[:length]
                values = file.sections.get(section, {})
                if name in values:
                    origin = f"{file.shown} {section_name(section)}"
                    return Setting(read_value(action, values[name], f"{origin} {name}"), origin)
        return None


def variable_of(name: str) -> str:
    """Return the environment variable of an option."""
    return PREFIX + name.replace("-", "_").upper()


def _variables(names: set[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the values of variables that are set to a text, by the names of their options.

    A misspelt option is an error. Variables that resemble no option may belong to other programs.
    """
    known = {variable_of(name): name for name in names}
    found: dict[str, str] = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in (FILE_VARIABLE, HOME_VARIABLE):
            continue
        if variable in known:
            if text:
                found[known[variable]] = text
            continue
        rest = variable.removeprefix(PREFIX)
        near = get_close_matches(rest, [one.removeprefix(PREFIX) for one in known], 1, SIMILAR)
        if near and not near[0].startswith(rest):  # KVFUSION_API_KEY is a good name for what --api-key-env names
            raise InvalidInputError(
                f"the environment variable {variable} sets no option; did you mean {PREFIX}{near[0]}?"
            )
    return found
