"""Defaults of options that files and environment variables set."""
