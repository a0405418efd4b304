"""KV-Fusion on llama.cpp: GGUF files with their quantised weights, in little memory or on GPUs that torch cannot use.

A GGUF file comes in, and a :class:`~kvfusion_rag.fusion.interface.FusionModel` goes out. Documents' KVs are rows of
llama.cpp's own cache, so they are stored like all others but never mixed with those of torch. The room must not know
about stores, requests or servers. It needs the extra ``llama-cpp``.
"""
