"""Whether the installed versions of other libraries fit each other."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ..errors import MissingDependencyError

# The bounds of pyproject.toml for the libraries that adapters need.
ADAPTER_LIBRARIES = {"transformers": ">=5.18,<5.24", "peft": ">=0.20,<0.22", "torchao": ">=0.18,<0.19"}


def require_adapters() -> None:
    """Check that transformers takes the installed peft, and peft the installed torchao, if there is one.

    Raises:
        MissingDependencyError: they do not fit each other; the message names their versions and the command that
            installs fitting ones.
    """
    try:
        # A version outside the bounds may lack these names.
        from peft.import_utils import is_torchao_available
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils.peft_utils import check_peft_version

        check_peft_version(MIN_PEFT_VERSION)
        is_torchao_available()
    except (ImportError, ValueError) as error:
        found = _installed()
        needed = " ".join(f'"{name}{ADAPTER_LIBRARIES[name]}"' for name in found)
        listed = ", ".join(f"{name} {number}" for name, number in found.items())
        raise MissingDependencyError(
            f"no adapter can be used or trained, because the installed versions do not fit each other: {listed} "
            f"({error}); run: pip install {needed}"
        ) from error


def _installed() -> dict[str, str]:
    """The installed version of each library that is installed."""
    found: dict[str, str] = {}
    for name in ADAPTER_LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
