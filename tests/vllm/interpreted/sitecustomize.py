"""On PYTHONPATH with TRITON_INTERPRET=1: vLLM's V2 model runner runs on a CPU, its Triton kernels interpreted.

vLLM asks Triton for a backend for CPUs before it uses its kernels. Python runs this file at the start of every process.
"""

from types import SimpleNamespace

from triton.backends import backends

backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True))
