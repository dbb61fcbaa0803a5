"""``pop-mm serve``: an OpenAI endpoint for one pruned model."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import (
    SETTINGS,
    Backend,
    Budget,
    Device,
    Dtype,
    Gamma,
    Method,
    Model,
    Ratio,
    Scope,
    Settings,
    Weights,
    counted,
)

if TYPE_CHECKING:
    from ..settings.config import PopConfig

_NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")  # by transformers' server


def serve(
    context: typer.Context,
    model: Model,
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on; no passwords.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0: a free one.")] = 8000,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    backend: Backend = "auto",
    settings: Settings = None,
    max_new_tokens: Annotated[
        int, typer.Option(callback=counted(1), metavar="N", help="Longest answer that a request may ask for.")
    ] = 1024,
    queue: Annotated[int, typer.Option(callback=counted(0), metavar="N", help="Requests that may wait.")] = 64,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
) -> None:
    """Serve OpenAI's chat completions, pruned, on this machine. Needs the extra [serve]."""
    from .settings import config_of

    run(model, config_of(context, settings, *SETTINGS), host, port, max_new_tokens, queue, dtype, device, weights)


def run(
    name: str,
    config: PopConfig,
    host: str,
    port: int,
    max_new_tokens: int,
    waiting: int,
    dtype: str,
    device: str,
    weights: str = "auto",
) -> None:
    """The command: load the model, answer until Ctrl-C, and restore the model."""
    from rich.console import Console

    from ..samples import resolve
    from ..samples.quantise import check_weights
    from .generate import find_device, torch_dtype
    from .terminal import quiet, spinner, warn

    server = _server()
    check_weights(weights)
    where, kind = find_device(device), torch_dtype(dtype)
    limits = server.Limits(max_new_tokens=max_new_tokens, waiting=waiting)
    resolve(name)  # a sample is made here, with its own progress display
    with quiet():
        with spinner(f"Loading {name}"):
            served = server.ServedModel.load(name, config, dtype=kind, device=where, weights=weights)
        with server.prepared(served, host=host, port=port, limits=limits) as serving:
            if not server.is_loopback(host):
                warn(f"whoever reaches {host} can use the model: there are no passwords here.")
            text = f"{name} answers at {serving.url}/v1, {config.label} (Ctrl-C ends it)."
            Console().print(text, highlight=False, soft_wrap=True)
            serving.run()


def _server() -> Any:
    """The server's module.

    Raises
    ------
    CommandError
        A package of the extra is missing, or transformers has another server than the one that is known.
    """
    from .terminal import CommandError

    missing = [package for package in _NEEDED if find_spec(package) is None]
    if missing:
        raise CommandError(f'The server needs {", ".join(missing)}, not installed here: pip install "pop_mm[serve]".')
    try:
        from ..engines.server import run as server
    except ImportError as error:
        import transformers

        raise CommandError(
            f"pop-mm serve is made of transformers' own server, which is another one in transformers "
            f"{transformers.__version__} ({error}). Install transformers 5.23."
        ) from error
    return server


__all__ = ["run", "serve"]
