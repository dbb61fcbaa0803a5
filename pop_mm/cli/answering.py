"""Commands that answer prompts and questions, dense and pruned.

Heavy modules are imported inside the commands, so that ``pop-mm --help`` is fast.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .options import (
    SETTINGS,
    Backend,
    Budget,
    Device,
    Dtype,
    Gamma,
    JsonFile,
    MaxNewTokens,
    Method,
    Model,
    Plot,
    Prefill,
    ProbeTokens,
    Ratio,
    Scope,
    Seed,
    Settings,
    Temperature,
    Weights,
)


def generate(
    context: typer.Context,
    model: Model,
    prompt: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="What to answer, or with --no-chat to continue; - is stdin.", show_default=False
        ),
    ] = None,
    prompt_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Take the prompt from a text file instead.", show_default=False)
    ] = None,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    prefill: Prefill = "dense",
    probe_tokens: ProbeTokens = 0,
    backend: Backend = "auto",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template, if it has one.")] = True,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Answer a prompt dense and pruned, side by side, with the decode speed of each."""
    from .generate import Sampling, run
    from .settings import config_of
    from .terminal import words

    config = config_of(context, settings, *SETTINGS, "prefill", "probe_tokens")
    sampling = Sampling(max_new_tokens, temperature, seed, chat)
    run(model, words("prompt", prompt, prompt_file), config, sampling, dtype, device, json_file, plot, weights)


def chat(
    context: typer.Context,
    model: Model,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    template: Annotated[
        bool, typer.Option("--chat/--no-chat", help="Use the tokenizer's chat template, if it has one.")
    ] = True,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
) -> None:
    """Talk to a model in the terminal: /dense and /pruned change how it answers, /help lists the rest."""
    from .chat import run
    from .generate import Sampling
    from .settings import config_of

    config = config_of(context, settings, "ratio", "budget", "method")
    run(model, config, Sampling(max_new_tokens, temperature, seed, template), dtype, device, weights)


def ask(
    context: typer.Context,
    question: Annotated[str, typer.Argument(help="What to ask about the image; - is stdin.", show_default=False)],
    image: Annotated[list[str], typer.Option(metavar="FILE", help="Give it again for more.", show_default=False)],
    model: Model = "tiny-vlm",
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    prefill: Prefill = "dense",
    probe_tokens: ProbeTokens = 0,
    backend: Backend = "auto",
    settings: Settings = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
    json_file: JsonFile = None,
    plot: Plot = None,
) -> None:
    """Ask a vision-language model about images: dense and pruned, side by side, with the decode speed of each."""
    from .ask import run
    from .generate import Sampling
    from .settings import config_of
    from .terminal import words

    config = config_of(context, settings, *SETTINGS, "prefill", "probe_tokens")
    run(
        model,
        image,
        words("question", question),
        config,
        Sampling(max_new_tokens, temperature, seed, True),
        dtype,
        device,
        json_file,
        plot,
        weights,
    )


def web_app(
    context: typer.Context,
    model: Model = "tiny-vlm",
    port: Annotated[
        int, typer.Option(min=1, max=65535, metavar="N", help="Of 127.0.0.1; no other machine can reach it.")
    ] = 7860,
    ratio: Ratio = None,
    budget: Budget = None,
    method: Method = "auto",
    scope: Scope = "overall",
    gamma: Gamma = 0.1,
    backend: Backend = "auto",
    settings: Settings = None,
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    device: Device = "auto",
) -> None:
    """Serve a web page on this machine that answers a question dense and pruned. Needs the extra [app]."""
    from ..app.server import run
    from .settings import config_of

    run(model, port, config_of(context, settings, *SETTINGS), dtype, device, weights)


__all__ = ["ask", "chat", "generate", "web_app"]
