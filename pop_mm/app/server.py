"""Serves the page on this machine alone, without a request to any other."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from rich.console import Console

from ..cli.generate import find_device, torch_dtype
from ..cli.terminal import CommandError, quiet, spinner
from ..samples import resolve
from ..samples.quantise import check_weights
from ..session.plans import plans_of
from ..settings.config import PopConfig
from .asker import MAX_BYTES, Asker
from .examples import SCENES
from .page import build_page, css

HOST = "127.0.0.1"
# The browser itself then refuses what a script or style sheet would fetch elsewhere.
_POLICY = b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"


@dataclass(frozen=True)
class Served:
    """A page that is being served.

    Attributes
    ----------
    url : str
    asker : Asker
    """

    url: str
    asker: Asker


def run(name: str, port: int, config: PopConfig, dtype: str, device: str, weights: str = "auto") -> None:
    """The command: load the model, serve the page and wait for Ctrl-C."""
    check_gradio()
    check_weights(weights)
    where, kind = find_device(device), torch_dtype(dtype)
    resolve(name)  # a sample is made here, with its own progress display
    with quiet():
        with spinner(f"Loading {name}"):
            asker = Asker.load(name, dtype=kind, device=where, weights=weights)
            plans_of(asker.model, config)  # that the settings fit is better known now
            asker.warm_up(config)
        with serve(asker, port, config) as served:
            Console().print(f"{name} answers at {served.url} (Ctrl-C ends it).", highlight=False, soft_wrap=True)
            threading.Event().wait()


def check_gradio() -> None:
    """Raise ``CommandError`` where gradio is not installed."""
    if find_spec("gradio") is None:
        raise CommandError('The page needs gradio, which is not installed: pip install "pop_mm[app]".')


@contextmanager
def serve(asker: Asker, port: int, config: PopConfig | None = None) -> Iterator[Served]:
    """Serve the page while the block runs; what users uploaded is deleted afterwards.

    Parameters
    ----------
    asker : Asker
    port : int
    config : PopConfig, optional
        What the page begins with; without one, the default budget.

    Raises
    ------
    CommandError
        No gradio, or a port that cannot be used.
    """
    check_gradio()
    with tempfile.TemporaryDirectory(prefix="pop_mm-app-") as folder, _environment(folder):
        import gradio as gr
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        page = build_page(asker, config or PopConfig())
        hosts = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
        try:
            _, url, _ = page.launch(
                server_name=HOST,
                server_port=port,
                share=False,
                prevent_thread_lock=True,
                quiet=True,
                inbrowser=False,
                allowed_paths=[str(SCENES)],
                max_file_size=MAX_BYTES,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                app_kwargs={"middleware": [hosts, Middleware(_Policy)]},
                theme=_theme(gr),
                css=css(),
            )
        except OSError as error:
            raise CommandError(
                f"Port {port} of {HOST} cannot be used, perhaps by a page like this one: give another --port."
            ) from error
        try:
            yield Served(url, asker)
        finally:
            page.close(verbose=False)


def _theme(gr: Any) -> Any:
    """Fonts that every machine has, and colours that can be read on each other."""
    theme = gr.themes.Default(
        primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    )
    dark = {
        f"button_primary_background_fill{state}": "*primary_700" for state in ("", "_hover", "_dark", "_hover_dark")
    }
    return theme.set(**dark, body_text_color_subdued="*neutral_500")


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    """What gradio takes from the environment only: no telemetry, uploads in our folder, no proxy on the way to itself."""
    passing = ",".join(filter(None, (os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), HOST)))
    wanted = {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "NO_PROXY": passing, "no_proxy": passing}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


class _Policy:
    """Adds the content security policy to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), (b"content-security-policy", _POLICY)]
            await send(message)

        await self._app(scope, receive, with_policy)
