"""Engines beside ``generate()``: :mod:`.server` is transformers' server with a pruned model inside (``pop-mm serve``)."""
