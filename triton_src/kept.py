"""The cache of what was compiled, by its key: how an entry is written, and how a wheel's kernels become entries.

An entry is KEY.json, what `compile_variant` says of a variant, with KEY.cubin and KEY.ptx beside it; what these are
compressed to is there too, by the hash of what was compressed. An entry that came from a wheel has no PTX where the
wheel has none, which is so of all architectures but one. What else is made of PTX, `follows`, its description says
then.
"""

import functools
import hashlib
import io
import json
import lzma
import os
import zipfile
from pathlib import Path

#: How code is compressed: csrc/cuda/lzma.h reads it.
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 6, "lc": 0, "lp": 0, "pb": 4}]

#: The code of a variant. Where each is, in the decoded bytes of which part of cubins.bin, the manifest says.
PARTS = ("cubin", "ptx")

# What it says beside that and beside a variant's description.
ADDED = ("code", "key")


def keep(stored, contents):
    """Writes {suffix: bytes} beside each other: by renaming, as others may read the cache; the last is what says that
    the rest is there, so an interrupted run leaves nothing half done."""
    for suffix, content in contents.items():
        partial = stored.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.rename(stored.with_suffix(suffix))


def compressed(text, cache):
    """The file in the cache that has these bytes compressed, if it is there."""
    return Path(cache) / f"{hashlib.sha256(repr(LZMA).encode() + text).hexdigest()}.lzma"


def compress(text, cache):
    """LZMA of these bytes, half a second's work for a megabyte, from the cache if it is there. Returns its file."""
    stored = compressed(text, cache)
    if not stored.exists():
        keep(stored, {".lzma": lzma.compress(text, lzma.FORMAT_RAW, filters=LZMA)})
    return stored


def symbol(library, name):
    """What a shared library, as bytes, has under this name."""
    from elftools.elf.elffile import ELFFile  # builds that take nothing need no pyelftools

    elf = ELFFile(io.BytesIO(library))
    [found] = elf.get_section_by_name(".dynsym").get_symbol_by_name(name)
    [at] = elf.address_offsets(found["st_value"], found["st_size"])
    return library[at:][: found["st_size"]]


def embedded(place):
    """(manifest, cubins.bin) of a wheel, or of the folder of an installed package. FileNotFoundError if it has no
    kernels, or is neither."""
    package = zipfile.Path(place, "adasplash/") if zipfile.is_zipfile(place) else Path(place)
    manifest = package / "lib" / "adasplash" / "manifest.json"
    if not manifest.exists():
        raise FileNotFoundError(manifest)
    shared = package / "lib" / "libadasplash_kernels.so"
    inside = (folder / "libadasplash.so" for folder in (package / "lib").iterdir() if folder.name.startswith("torch"))
    library = shared if shared.exists() else next(inside)
    return json.loads(manifest.read_text()), symbol(library.read_bytes(), "adasplash_cubins")


def take(place, cache):
    """Puts what a wheel or an installed package has into the cache. Returns how many entries that has got."""
    manifest, code = embedded(place)

    @functools.cache
    def decoded(offset, size):
        small = code[offset:][:size]
        text = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA).decompress(small)
        keep(compressed(text, cache), {".lzma": small})
        return text

    taken = 0
    for one in manifest["variants"]:
        if "cubin" not in one:  # a wheel from before cubins were compressed
            continue
        stored = Path(cache) / one["key"]
        parts = {f".{part}": one[part] for part in PARTS if part in one}
        if all(stored.with_suffix(suffix).exists() for suffix in (*parts, ".json")):
            continue
        contents = {
            suffix: decoded(part["offset"], part["size"])[part["at"] :][: part["length"]]
            for suffix, part in parts.items()
        }
        description = {name: value for name, value in one.items() if name not in (*PARTS, *ADDED)}
        keep(stored, contents | {".json": json.dumps(description).encode()})
        taken += 1
    return taken
