"""Many requests over one model: questions, documents and options in, answers out.

``calls`` and ``engine`` turn arguments into requests, ``queue`` batches callers, ``runner`` answers requests, ``run`` is
one batch while it is decoded, and ``document_kvs`` takes KVs from the store or computes them. ``modes`` decides
positions and adapter, ``focus`` chooses documents. The engine only sees a model through ``fusion.interface``, and does
not know files, frameworks or HTTP.
"""
