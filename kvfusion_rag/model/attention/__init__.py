"""Attention: what a query sees and how it weighs it.

Queries, keys, values and positions enter; masks, outputs and weights leave. Nothing here knows about weights of models,
adapters or text.
"""
