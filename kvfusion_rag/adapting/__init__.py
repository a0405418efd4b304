"""Adapting a model to fused documents without labels: a folder of documents in, an adapter and its card out.

The model asks and answers questions about its own documents (``questions``, ``filtering``), learns to repeat over
fused documents what it answers from the one passage (``making``), and is judged on held-out questions (``judging``).
The adapter is kept only if it wins. ``stages`` lets an interrupted run continue. Serving is not known here.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
