"""The remote tier of a store: document files behind a URL, with uploads in the background.

Document KVs and whole files come in, and so do the names that a shared folder or bucket lists, of which none is
trusted. Files of the expected size go out, and what has become of every upload. The room must not know about the other
tiers.
"""

from .store import RemoteStore

__all__ = ["RemoteStore"]
