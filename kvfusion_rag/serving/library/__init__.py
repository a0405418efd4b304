"""The files that a server answers from, if a request has no documents: a folder's and those that tenants upload.

An index, questions and uploaded files come in, and the documents nearest to a question go out. This room reads files
only with the loaders of ``retrieval``, and must not know the generator.
"""

from __future__ import annotations

from .library import Library, LibraryFile
from .uploads import MAX_UPLOADS, Uploads, UploadSpace

__all__ = ["MAX_UPLOADS", "Library", "LibraryFile", "UploadSpace", "Uploads"]
