"""GGUF files: a file enters, and the folder of an ordinary transformers model leaves.

``header`` checks the file, ``convert`` writes the folder, and ``conversion_cache`` keeps it, so that each file is
converted once per machine. Nothing here knows about fusion, prompts or devices.
"""
