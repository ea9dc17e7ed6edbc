"""Text that Debian ships, without root: the indices of a release, and files out of its packages."""

import hashlib
import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

#: A release whose packages change no more, so that results can be compared.
RELEASE = "bookworm"
MIRROR = "https://deb.debian.org/debian"
#: The indices that are read: what packages there are, and what they say about themselves.
PACKAGES, DESCRIPTIONS = "binary-amd64/Packages", "i18n/Translation-en"
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def cache_folder() -> Path:
    """Where things are kept that were fetched: $ADASPLASH_DATA, or ~/.cache/torch-adasplash/data."""
    folder = Path(os.environ.get("ADASPLASH_DATA") or Path.home() / ".cache/torch-adasplash/data")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Apt:
    """Fetches by apt, which checks signatures, with lists of its own and not those of the system."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve() / "apt"
        (self.folder / "lists/partial").mkdir(parents=True, exist_ok=True)
        sources = self.folder / "sources.list"
        sources.write_text(f"deb [signed-by={_KEYS}] {MIRROR.replace('https', 'http')} {RELEASE} main\n")
        options = {
            "Dir::State": self.folder,
            "Dir::State::lists": self.folder / "lists",
            "Dir::Cache": self.folder / "cache",
            "Dir::Etc::sourcelist": sources,
            "Dir::Etc::sourceparts": "-",
            "APT::Architecture": "amd64",
            "Acquire::Languages": "en",
            "APT::Sandbox::User": "",  # the folder need not be readable for apt's own user
        }
        self._options = [part for key, value in options.items() for part in ("-o", f"{key}={value}")]

    @staticmethod
    def is_there() -> bool:
        return shutil.which("apt-get") is not None and _KEYS.exists()

    def _run(self, *arguments: str) -> str:
        command = [arguments[0], *self._options, *arguments[1:]]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{' '.join(arguments)} failed: {done.stderr.strip()}")
        return done.stdout

    def index(self, name: str) -> str:
        """The text of an index of the release."""
        if not any((self.folder / "lists").glob("*Packages*")):
            self._run("apt-get", "update")
        listed = self._run("apt-get", "indextargets", "--format", "$(FILENAME)", f"MetaKey: main/{name}")
        return self._run("/usr/lib/apt/apt-helper", "cat-file", listed.split()[0])

    def package(self, name: str) -> Path:
        """The newest file of a package."""
        self.index(PACKAGES)
        self._run("apt-get", "download", name)
        return max(self.folder.glob(f"{name}_*.deb"), key=lambda path: path.stat().st_mtime)


class Mirror:
    """Fetches by URL where there is no apt."""

    def __init__(self, folder: Path, url: str):
        self.folder, self.url = folder, url

    def _fetch(self, path: str) -> bytes:
        with urllib.request.urlopen(f"{self.url}/{path}") as response:
            return response.read()

    def index(self, name: str) -> str:
        """The text of an index of the release."""
        return lzma.decompress(self._fetch(f"dists/{RELEASE}/main/{name}.xz")).decode()

    def package(self, name: str) -> Path:
        """The file of a package."""
        for entry in stanzas(self.index(PACKAGES)):
            if entry["Package"] == name:
                content = self._fetch(entry["Filename"])
                if hashlib.sha256(content).hexdigest() != entry["SHA256"]:
                    raise OSError(f"{entry['Filename']} is not what the index says")
                path = self.folder / Path(entry["Filename"]).name
                path.write_bytes(content)
                return path
        raise LookupError(f"Debian {RELEASE} has no package {name!r}")


def source() -> Apt | Mirror:
    """Whatever this machine can fetch with."""
    return Apt(cache_folder()) if Apt.is_there() else Mirror(cache_folder(), MIRROR)


def stanzas(index: str) -> Iterator[dict[str, str]]:
    """The entries of an index by their fields. Lines that continue a field keep their line breaks."""
    for stanza in index.split("\n\n"):
        fields = re.findall(r"^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza, re.MULTILINE)
        if fields:
            yield dict(fields)


def unpack(name: str) -> Path:
    """A folder with the files of a package, fetched where it is not there yet."""
    folder = cache_folder() / name
    if not folder.exists():
        unfinished = folder.with_suffix(".part")
        shutil.rmtree(unfinished, ignore_errors=True)
        unpack_file(source().package(name), unfinished)
        unfinished.rename(folder)
    return folder


def unpack_file(package: Path, folder: Path) -> None:
    """Writes the files of a .deb below `folder`."""
    if shutil.which("dpkg-deb"):
        subprocess.run(["dpkg-deb", "-x", str(package), str(folder)], check=True)
        return
    with tarfile.open(fileobj=io.BytesIO(_member(package.read_bytes(), b"data.tar"))) as archive:
        archive.extractall(folder, filter="data")


def _member(archive: bytes, name: bytes) -> bytes:
    """The content of the member of an ar archive whose name begins so."""
    place = len(b"!<arch>\n")
    while place < len(archive):
        header = archive[place : place + 60]
        size = int(header[48:58])
        place += 60
        if header.startswith(name):
            return archive[place : place + size]
        place += size + size % 2
    raise ValueError(f"the archive has no member {name.decode()}")
