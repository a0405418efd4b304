"""The language model: find it, load it, and run its forward passes.

A name, a folder or a GGUF file enters, then token ids with positions and masks. Keys and values of documents, logits
and digests leave. Only ``backbone`` calls the model. Nothing here knows about prompts, answers, stores or requests.
"""
