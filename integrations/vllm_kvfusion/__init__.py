"""KV-Fusion in vLLM: a connector that loads separately prefilled documents from a store of kvfusion-rag.

``kvfusion serve --engine vllm`` starts vLLM with it. See docs/engines.md for starting vLLM yourself. vLLM imports
:mod:`vllm_kvfusion.connector`; this module imports nothing, so that it can be installed without vLLM.
"""
