"""Attention: what a query sees and how it weighs it.

Queries, keys, values and positions enter; masks, outputs and attention weights leave. Nothing here knows about model
weights, adapters or text.
"""
