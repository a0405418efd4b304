"""Small random models with the structure of the real ones: the families of the compatibility table."""

from .dense import DENSE
from .experts import EXPERTS
from .latent import LATENT
from .other import OTHER
from .recurrent import RECURRENT
from .shape import Family
from .windowed import WINDOWED

FAMILIES: tuple[Family, ...] = (*DENSE, *EXPERTS, *WINDOWED, *LATENT, *OTHER, *RECURRENT)

__all__ = ["FAMILIES", "Family"]
