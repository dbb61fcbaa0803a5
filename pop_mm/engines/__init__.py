"""Engines beside ``generate()``.

:mod:`.server` is transformers' server with a pruned model inside (``pop-mm serve``). ``vllm`` is a plug-in of vLLM, which finds
it by its entry point.
"""
