"""Checks that the installed libraries can load and train adapters together."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ...errors import MissingDependencyError

# The bounds of pyproject.toml for the libraries that adapters need.
ADAPTER_LIBRARIES = {"transformers": ">=5.18,<5.24", "peft": ">=0.20,<0.22", "torchao": ">=0.18,<0.19"}


def require_adapter_libraries() -> None:
    """Check that transformers accepts the installed peft, and that peft accepts torchao if it is installed.

    Raises:
        MissingDependencyError: the libraries are not compatible. The message lists the versions and the command that
            installs compatible ones.
    """
    try:
        # A version outside the bounds may lack these names.
        from peft.import_utils import is_torchao_available
        from transformers.integrations.peft import MIN_PEFT_VERSION
        from transformers.utils.peft_utils import check_peft_version

        check_peft_version(MIN_PEFT_VERSION)
        is_torchao_available()
    except (ImportError, ValueError) as error:
        installed = _installed_versions()
        needed = " ".join(f'"{name}{ADAPTER_LIBRARIES[name]}"' for name in installed)
        listed = ", ".join(f"{name} {number}" for name, number in installed.items())
        raise MissingDependencyError(
            f"no adapter can be used or trained, because the installed versions are not compatible: {listed} "
            f"({error}); run: pip install {needed}"
        ) from error


def _installed_versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in ADAPTER_LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
