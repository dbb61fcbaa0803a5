"""Try the wheel as a user does who has no compiler: README's first example in an environment of its own, and what was fast.

    python scripts/try_dist.py [--dist dist] [--venv .venv-dist]

Installs the wheel and its dependencies as constraints.txt pins them, and fails where anything is masked or compiled. Needs the
sample smollm2-135m, which is fetched once.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

CHECKS = """
import sys
from pathlib import Path
import torch
import pop_mm
from pop_mm.kernels import DTYPES, sources
from pop_mm.native import shipped
from pop_mm.ops import library

assert Path(pop_mm.__file__).is_relative_to(sys.prefix), pop_mm.__file__
facts = session.report.to_dict()
assert facts["kernels"] == "compiled", facts["kernels"]
assert set(session.report.backends) == {"rows"}, session.report.backends
assert session.timings.masked_forwards == 0 < session.timings.decode_forwards, session.timings
with pop_mm.prune(model, ratio=0.2) as session:
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
assert session.report.to_dict()["kernels"] == "compiled"
assert set(session.report.backends) == {"inplace"}, session.report.backends
every = [*map(sources, DTYPES), *library.every_source()]
missing = [s.name for s in every for v in shipped.VARIANTS["@MACHINE@"] if not shipped.path(s, v).exists()]
assert not missing, missing
mapped = Path("/proc/self/maps").read_text()
fast = [line.split()[-1] for line in mapped.splitlines() if line.endswith(".so") and "pop_mm" in line]
assert fast and all(str(shipped.FOLDER) in name for name in fast), fast
print("fast from", ", ".join(sorted({Path(name).parent.name for name in fast})))
"""


def first_example() -> str:
    """README's first block of Python."""
    found = re.search(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert found, "README has no example"
    return found[1]


def main() -> None:
    """Install and try."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-dist")
    options = parser.parse_args()
    wheels = list(options.dist.glob("*.whl"))
    if len(wheels) != 1:
        raise SystemExit(f"{options.dist} holds {len(wheels)} wheels instead of one: run `make dist` first.")
    python = options.venv.absolute() / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", options.venv], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
    subprocess.run([*install, "torch"], check=True)
    subprocess.run([*install, wheels[0]], check=True)
    subprocess.run([*install, "--force-reinstall", "--no-deps", wheels[0]], check=True)
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([python, "-c", 'from pop_mm.samples import fetch; fetch("smollm2-135m")'], check=True, cwd="/")
    kept = {name: value for name, value in os.environ.items() if name in ("HOME", "POP_MM_CACHE", "XDG_CACHE_HOME")}
    bare = {**kept, "PATH": str(python.parent), "CC": "/bin/false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        code = first_example() + CHECKS.replace("@MACHINE@", os.uname().machine)
        subprocess.run([python, "-c", code], check=True, env=bare, cwd=elsewhere)
        subprocess.run([python.with_name("pop-mm"), "--version"], check=True, env=bare, cwd=elsewhere)


if __name__ == "__main__":
    main()
