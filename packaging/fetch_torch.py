"""Fetches what a build needs of some releases of torch: headers, CMake files, and the libraries to link against.

    python packaging/fetch_torch.py 2.11 2.12 --out build/torches

Prints their folders, separated by colons, as setup.py takes them in ADASPLASH_TORCH. The kind of torch (CPU, CUDA) and
its Python do not matter to what is built, so it takes whatever pip finds here. What is there already stays.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LINKED = {f"torch/lib/{name}" for name in ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1")}


def needed(name: str) -> bool:
    return name.startswith(("torch/include/", "torch/share/")) or name == "torch/version.py" or name in LINKED


def fetch(release: str, out: Path) -> Path:
    """The folder of this minor release, such as ``2.11``, of which pip chooses the patch."""
    folder = out / release
    if not folder.exists():
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out) as partial:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial]
            subprocess.run([*command, f"torch=={release}.*"], check=True, stdout=sys.stderr)
            [wheel] = Path(partial).glob("torch-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(Path(partial) / release, filter(needed, archive.namelist()))
            (Path(partial) / release).rename(folder)
    return folder / "torch"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="+", metavar="2.N")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    print(*(fetch(release, args.out.resolve()) for release in args.releases), sep=os.pathsep)


if __name__ == "__main__":
    main()
