"""Adapters of peft: found, checked against their base model, loaded, and switched on and off.

Nothing here knows how a model is loaded or called.
"""
