"""KV-Fusion itself: token ids and document KVs in, answers as token ids and text out.

``prefill`` is Dp, ``fused_cache`` is RES and ``decode`` is Dt. ``gate`` measures that a model obeys the laws of fusion.
``interface`` is the seam that the engine sees, and ``torch_model`` implements it. Prompts, stores, batching and
namespaces are not known here.
"""
