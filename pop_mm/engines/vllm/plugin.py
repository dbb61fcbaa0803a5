"""What changes in a vLLM process, once. Nothing of it acts in an engine without pop_mm's settings."""

from __future__ import annotations

from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.worker_base import WorkerWrapperBase

from ...config import PopConfig
from ...errors import EngineError
from . import prefixes
from .settings import check_engine, settings_of

_installed = False


def install() -> None:
    """Let CPU workers with pop_mm's settings have the masked runner, and let no other worker start with them."""
    global _installed
    if _installed:  # vLLM loads plug-ins in every process, and may do so again
        return
    init_device = WorkerWrapperBase.init_device

    def checked(self: WorkerWrapperBase) -> None:
        config = settings_of(self.vllm_config)
        if config is None:
            init_device(self)
            return
        check_engine(self.vllm_config)
        with_masked_runner(init_device, self, config)
        found = self.worker.model_runner
        if not hasattr(found, "pop_mm"):
            raise EngineError(
                f"pop_mm's settings were given, but the worker runs {type(found).__module__}.{type(found).__name__}, which the "
                "plug-in does not know: the model would be served dense. Use vLLM's V1 runner on a CPU "
                "(VLLM_USE_V2_MODEL_RUNNER=0), or leave pop_mm's settings out."
            )
        available = self.worker.determine_available_memory
        self.worker.determine_available_memory = lambda: found.memory_for_cache(available())

    WorkerWrapperBase.init_device = checked
    prefixes.install()
    _installed = True


def with_masked_runner(init_device: Any, worker: WorkerWrapperBase, config: PopConfig) -> None:
    """Let a worker make its model runner; a CPU's is the masked one."""
    if not current_platform.is_cpu():
        init_device(worker)
        return
    from vllm.v1.worker import cpu_worker

    from .runner import MaskedCPUModelRunner

    plain = cpu_worker.CPUModelRunner

    def runner(vllm_config: Any, device: torch.device) -> MaskedCPUModelRunner:
        return MaskedCPUModelRunner(config, vllm_config, device)

    cpu_worker.CPUModelRunner = runner
    try:
        init_device(worker)
    finally:
        cpu_worker.CPUModelRunner = plain


__all__ = ["install"]
