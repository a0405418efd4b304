"""Question-answer files in, training and evaluation rows out.

``formats`` reads questions and passages, ``golds`` finds the gold passage of a question, ``mining`` finds negatives,
``exclusion`` keeps evaluation data out of training, ``windows`` cuts passages and finds evidence. ``build`` makes
rows as ``recipe`` says, ``groups`` makes rows that share their passages, ``writing`` writes them. No model is needed,
only its tokenizer to count tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
