"""Argument types for paths: inputs exist and outputs can be written, before a command starts to work."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError
from pathlib import Path

from ...data.writing import check_folder, check_output
from ...home import expanded
from .values import argument, plain_text, shown

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@argument
def existing(text: str) -> str:
    """Read the path of a file or folder that exists."""
    path = expanded(_path(text))
    if not os.path.exists(path):
        raise ArgumentTypeError(f"{shown(text)} does not exist")
    return str(path)


@argument
def existing_file(text: str) -> Path:
    """Read the path of a file that exists."""
    path = Path(existing(text))
    if path.is_dir():
        raise ArgumentTypeError(f"{shown(text)} is a folder, but it must be a file")
    return path


@argument
def settings_file(text: str) -> Path | str:
    """Read the path of a file with settings, which exists, or none."""
    return text if text == "none" else existing_file(text)


@argument
def output_file(text: str) -> Path:
    """Read the path of a file that can be written. It may exist."""
    path = expanded(_path(text))
    check_output(path, force=True)
    return path


@argument
def plot_file(text: str) -> Path:
    """Read the path of a plot that can be written. Its suffix is the format."""
    path = output_file(text)
    if path.suffix not in PLOT_SUFFIXES:
        raise ArgumentTypeError(f"{shown(text)} is not a plot, which must end in one of {', '.join(PLOT_SUFFIXES)}")
    return path


@argument
def output_folder(text: str) -> Path:
    """Read the path of a folder that can be written to, or created."""
    path = expanded(plain_text(text))
    check_folder(path)
    return path


@argument
def index_place(text: str) -> Path | str:
    """Read the place of an index: the URL of one in a vector database, or a folder as ``output_folder`` reads it."""
    from ...retrieval.databases import IndexUrl, is_index_url

    return IndexUrl.parse(text).text if is_index_url(text) else output_folder(text)


@argument
def existing_folder(text: str) -> Path:
    """Read the path of a folder that exists and can be written to."""
    path = output_folder(text)
    if not path.is_dir():
        raise ArgumentTypeError(f"{shown(text)} does not exist")
    return path


@argument
def store_place(text: str) -> str:
    """Read the place of a document store: an fsspec URL, or a folder that can be written to or created."""
    return plain_text(text) if "://" in text else str(output_folder(text))


def _path(text: str) -> str:
    """Return the text of a path, which may contain bytes that are not UTF-8, but not be empty."""
    if not text:
        raise ArgumentTypeError("the path is empty")
    return text
