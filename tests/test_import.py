import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

_SCRIPT = """
import json, sys, time
import torch
before = set(sys.modules)
started = time.perf_counter()
import pop_mm
print(json.dumps([time.perf_counter() - started, sorted(set(sys.modules) - before)]))
"""


def test_import_is_light():
    runs = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", _SCRIPT], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    assert min(seconds for seconds, _ in runs) < 0.3, "seconds that `import pop_mm` takes beyond `import torch`"
    heavy = {"transformers", "matplotlib", "rich", "typer", "accelerate"}
    assert not heavy & {name.split(".")[0] for name in runs[0][1]}


def test_help_is_light():
    script = "import sys\nfrom pop_mm.cli import main\ntry:\n    main(['--help'])\nfinally:\n    print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "matplotlib"} & set(done.stdout.split())


def test_every_package_is_installed():
    tomllib = pytest.importorskip("tomllib")
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {file.parent.relative_to(ROOT) for file in ROOT.glob("pop_mm/**/__init__.py")} - {Path("pop_mm/adapters")}
    assert listed == {".".join(folder.parts) for folder in found} | {"pop_mm.adapters"}
