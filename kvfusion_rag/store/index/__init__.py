"""The index of a store folder: sizes and last use of its files, in a small SQLite file that is not trusted.

Names and sizes of files enter, and leave as the files to evict and as totals. The room must not know what is in the
files, and removes them only through their folder.
"""

from .database import is_locked
from .index import Index

__all__ = ["Index", "is_locked"]
