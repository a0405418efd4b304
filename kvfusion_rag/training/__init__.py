"""Training: rows in, a tuned decoder out.

Rows of questions and passages enter and a LoRA adapter (or full weights) leaves. ``examples`` encodes and packs rows,
``loss`` is the paper's loss and distillation, ``trainer`` is the loop, ``run`` is one call for all of it. Training
does not know where rows come from (``data``) or how answers are served.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
