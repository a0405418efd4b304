"""Answers many requests over one model: questions, documents and options come in, answers go out.

``calls`` and ``engine`` turn arguments into requests, ``queue`` batches callers, and ``runner`` answers requests.
``running_batch`` is one batch while it is decoded. ``document_kvs`` takes KVs from the store or computes them.
``modes`` decides mode, positions and adapter, and ``focus`` chooses documents. The room only sees a model through
``fusion.interface``, and must not know about files, frameworks or HTTP.
"""
