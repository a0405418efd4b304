"""Trains the answering decoder Dt on rows.

Rows of questions and passages come in. A LoRA adapter or full weights go out, with the record of their training.
``examples`` encodes rows, ``batches`` orders them, ``loss`` contains the paper's loss and distillation, ``trainer`` is
the training loop, ``checkpoint`` saves and resumes it, ``processes`` connects several processes, ``shards`` splits the
frozen weights between them, and ``run`` does everything in one call. The room must not know how rows are built or how
answers are served.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
