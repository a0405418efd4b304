"""Calls of tools: how a model is told of tools, how it writes calls, and how they are found in its answer.

``call_format`` finds out how a model writes calls, ``conversation`` puts tools, calls and results into its prompt,
``grammar`` limits the answer to text and valid calls, and ``reading`` splits it again.
"""
