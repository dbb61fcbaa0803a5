"""A plug-in of vLLM (entry point ``vllm.general_plugins``): POP and thresholds for each request, in vLLM's own batches.

Switched on by ``--additional-config '{"pop_mm": {"budget": 0.65}}'``, an object of :class:`pop_mm.PopConfig`'s settings. What it
does not take over it refuses at load.
"""

from __future__ import annotations

from ...errors import EngineError, one_line


def register() -> None:
    """Make the plug-in known to this process; vLLM calls it.

    Raises
    ------
    EngineError
        This vLLM has other insides than the plug-in knows, so that it could not tell whether a model is served dense.
    """
    try:
        from .plugin import install

        install()
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"pop_mm's plug-in does not know this version of vLLM ({one_line(error)}); it was made for 0.32. Install that "
            "one, or set VLLM_PLUGINS to the plug-ins that are to be loaded, without pop_mm."
        ) from error


__all__ = ["register"]
