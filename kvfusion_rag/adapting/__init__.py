"""Adapts a model to fused documents without labelled data.

A model and a folder of documents come in. An adapter with its card and report goes out. The model writes and answers
questions about the documents (``questions``, ``filtering``), learns to give the same answers over fused documents
(``making``, then the room ``training``), and is judged on held-out questions (``judging``). The adapter is kept only
if it beats the untuned model. ``stages`` makes runs resumable. The room must not know how answers are served.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
