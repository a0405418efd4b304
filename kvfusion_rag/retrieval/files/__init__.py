"""Readers of files: the bytes of one file come in, and its text, title and places go out.

Each reader is a function of bytes, in time that grows in step with them. Files are untrusted: what an archive unpacks
to, and the number of its parts and cells, are bounded. This room must not know folders, chunks or the index.
"""
