"""Turns question-answer files into rows for training and evaluation.

Files of questions and passages in common formats come in. Rows go out, each with one question, its answers, and its
gold passage among negatives that do not contain an answer. ``formats`` and ``rows`` read files, ``golds`` and
``mining`` choose passages, ``windows`` cuts them, ``exclusion`` keeps evaluation data out of training, ``build`` and
``groups`` make the rows, and ``writing`` writes them. The room must not know models, generators or training: token
counts and vectors come from the caller.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
