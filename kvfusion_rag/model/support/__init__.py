"""Which models can be fused exactly, decided from the configuration alone."""

from .checks import configuration_checks, require_supported, routes_tokens

__all__ = ["configuration_checks", "require_supported", "routes_tokens"]
