"""KV-Fusion itself: token ids of documents and questions enter, document KVs and answers leave.

``prefill`` is Dp, ``fused_cache`` is RES and ``decode`` is Dt. ``gate`` measures that a model obeys the laws of
fusion. ``interface`` is the seam that the engine sees, and ``torch_model`` implements it. The room must not know
about prompts, stores, batching or namespaces.
"""
