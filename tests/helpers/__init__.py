"""What the tests share; ``from helpers.observe import prompt``.

- ``app_model``: the web page's model, tiny, and what tells that nobody changed it
- ``channels``: exchange channels, compute them one by one, look at their bits
- ``compatibility``: every wrapper and packed format with its plain twin; writes docs/compatibility.md
- ``covering``: each pair of parameters' values once, instead of their product
- ``modes``: the ways to decode, and sessions as the tests make them
- ``naive_evaluation``: what `pop_mm.evaluation` measures, in loops
- ``observe``: which channels a model used, and whether it is what it was
- ``pages``: code and command lines of README and docs
- ``reference``: POP in loops, for dense FFNs
- ``reference_moe``: POP in loops, for routed experts
- ``reference_thresholds``: thresholds in loops
- ``serve_model``: a tiny model behind the server, and its clients
- ``tiny_folder``: a tiny model as a folder of transformers
- ``tiny_models``: tiny random causal language models, one a model type
- ``tiny_processors``: processors for tiny vision-language models
- ``tiny_vlm_folder``: a tiny vision-language model as a folder of transformers
- ``tiny_vlms``: tiny random vision-language models, one a model type
- ``tp_cases``: what each process of a spread model does; run by torchrun
- ``typed_prune``: calls that mypy checks
- ``vlm_images``: pictures and their placeholders for tiny vision-language models
- ``wrapped``: a wrapped model against its twin
"""
