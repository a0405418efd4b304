"""KV-Fusion on vLLM: torch prefills documents into the store, and vLLM reads them from there and answers.

Requests of the engine come in, and tokens that a vLLM server has generated go out. The server is a process of its own.
It runs the connector of the package ``vllm_kvfusion``, which uses the public names of this room and nothing else of
this package. The room must not know about HTTP requests of users. It needs vLLM.
"""
