"""The cache of what was compiled, by its key: how an entry is written, and how a wheel's kernels become entries.

An entry is KEY.json, what `compile_variant` says of a variant, with KEY.cubin and KEY.ptx beside it; what PTX is
compressed to is there too, by the hash of the text. One that came from
a wheel has no PTX where the wheel has none, which is so of all architectures but one. What else is made of PTX,
`follows`, its description says then.
"""

import hashlib
import json
import lzma
import os
import struct
import zipfile
from pathlib import Path

#: How PTX is compressed: csrc/cuda/lzma.h reads it.
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 6}]

# What the manifest says of a variant beside its description: where its code is in cubins.bin, and its key.
PLACES = ("code", "offset", "size", "ptx", "key")


def keep(stored, contents):
    """Writes {suffix: bytes} beside each other: by renaming, as others may read the cache; the last is what says that
    the rest is there, so an interrupted run leaves nothing half done."""
    for suffix, content in contents.items():
        partial = stored.with_suffix(f".{os.getpid()}")
        partial.write_bytes(content)
        partial.rename(stored.with_suffix(suffix))


def compressed(text, cache):
    """The file in the cache that has this text compressed, if it is there."""
    return Path(cache) / f"{hashlib.sha256(repr(LZMA).encode() + text).hexdigest()}.lzma"


def compress(text, cache):
    """LZMA of this text, which takes a second for a megabyte, from the cache if it is there. Returns its file."""
    stored = compressed(text, cache)
    if not stored.exists():
        keep(stored, {".lzma": lzma.compress(text, lzma.FORMAT_RAW, filters=LZMA)})
    return stored


def symbol(library, name):
    """What a shared library, as bytes, has under this name."""
    (sections,) = struct.unpack_from("<Q", library, 40)
    size, count = struct.unpack_from("<HH", library, 58)
    # of each: name, type, flags, address, offset, size, link
    headers = [struct.unpack_from("<IIQQQQI", library, sections + i * size) for i in range(count)]
    symbols = next(header for header in headers if header[1] == 11)  # SHT_DYNSYM
    names, wanted = headers[symbols[6]][4], f"{name}\0".encode()
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name_at, _, _, _, address, length = struct.unpack_from("<IBBHQQ", library, at)
        if library.startswith(wanted, names + name_at):
            section = next(header for header in headers if header[3] and 0 <= address - header[3] < header[5])
            return library[address - section[3] + section[4] :][:length]
    raise ValueError(f"the library has no {name}")


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
    texts, taken = {}, 0
    for one in manifest["variants"]:
        if "key" not in one:  # those of 0.1
            continue
        stored, ptx = Path(cache) / one["key"], one.get("ptx")
        suffixes = [".cubin", *([".ptx"] if ptx else []), ".json"]
        if all(stored.with_suffix(suffix).exists() for suffix in suffixes):
            continue
        contents = {".cubin": code[one["offset"] :][: one["size"]]}
        if ptx:
            start = ptx["offset"]
            if start not in texts:
                small = code[start:][: ptx["size"]]
                texts[start] = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA).decompress(small)
                keep(compressed(texts[start], cache), {".lzma": small})
            contents[".ptx"] = texts[start][ptx["at"] :][: ptx["length"] - 1]  # less the zero that ends it
        description = {name: value for name, value in one.items() if name not in PLACES}
        keep(stored, contents | {".json": json.dumps(description).encode()})
        taken += 1
    return taken
