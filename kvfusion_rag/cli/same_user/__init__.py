"""Lets ``kvfusion ask`` use a server that the same user runs over the same files, with the same model and settings.

The server listens on a Unix socket in a folder that only its user can open. The socket's name is a digest of all
settings that change an answer, so a socket that exists and belongs to the user is the right server.
"""
