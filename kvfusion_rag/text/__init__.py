"""Text to token ids and back: documents, questions and prompts enter, token ids leave.

``settings`` and ``chat`` define what the model reads, ``encoder`` turns untrusted text into ids without control
tokens, ``documents`` and ``splitting`` prepare the documents of one question, ``layouts`` builds whole prompts, and
``citations`` finds an answer in its documents. Nothing here loads torch or knows about weights, positions or
stores.
"""
