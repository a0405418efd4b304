"""Keeps secrets out of reports and messages. Imports nothing that a user's own file could shadow."""

from __future__ import annotations

import re

SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD")  # in names of environment variables
_PASSWORD = re.compile(r"(?<=://)[^/@\s]+@")


def without_password(text: str) -> str:
    """Return ``text`` without users and passwords in URLs."""
    return _PASSWORD.sub("***@", text)
