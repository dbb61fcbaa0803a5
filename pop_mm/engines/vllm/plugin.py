"""What changes in a vLLM process, once. Nothing of it acts in an engine without pop_mm's settings."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.worker.worker_base import WorkerWrapperBase

from ...errors import EngineError
from ...settings.config import PopConfig
from . import carried, prefixes
from .settings import check_engine, settings_of

_installed = False


def install() -> None:
    """Let workers with pop_mm's settings have a masked runner, and let none start that would have another."""
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
                "plug-in does not know: the model would be served dense. Use vLLM's V2 runner on a GPU "
                "(VLLM_USE_V2_MODEL_RUNNER=1) or either runner on a CPU, or leave pop_mm's settings out."
            )
        available = self.worker.determine_available_memory
        self.worker.determine_available_memory = lambda: found.memory_for_cache(available())

    WorkerWrapperBase.init_device = checked
    prefixes.install()
    carried.install()
    _installed = True


def with_masked_runner(init_device: Any, worker: WorkerWrapperBase, config: PopConfig) -> None:
    """Let a worker make its model runner; one that the plug-in knows is the masked one."""
    found = _runner_of(worker.vllm_config)
    if found is None:
        init_device(worker)
        return
    module, name, masked = found
    plain = getattr(module, name)

    def runner(vllm_config: Any, device: torch.device) -> Any:
        return masked(config, vllm_config, device)

    setattr(module, name, runner)
    try:
        init_device(worker)
    finally:
        setattr(module, name, plain)


def _runner_of(vllm_config: Any) -> tuple[ModuleType, str, Any] | None:
    """Where vLLM's workers find the class of their model runner, and the class that masks; None if there is none."""
    cpu = current_platform.is_cpu()
    if vllm_config.use_v2_model_runner and (cpu or current_platform.is_cuda_alike()):
        module = import_module("vllm.v1.worker.cpu.model_runner" if cpu else "vllm.v1.worker.gpu.model_runner")
        name = "CPUModelRunner" if cpu else "GPUModelRunner"
        from .v2 import masked_v2

        return module, name, masked_v2(getattr(module, name))
    if cpu and not vllm_config.use_v2_model_runner:
        from .v1 import MaskedCPUModelRunner

        return import_module("vllm.v1.worker.cpu_worker"), "CPUModelRunner", MaskedCPUModelRunner
    return None


__all__ = ["install"]
