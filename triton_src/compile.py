"""Compiles every variant ahead of time, without a GPU: python -m triton_src.compile --arch 80 90 --out DIR

Writes to DIR
    cubins.bin      compressed, the machine code of all variants, and PTX of one architecture below 90
    manifest.json   what each is: symbol, arguments and their types, constants, warps, shared memory, place in the file
    variants.cpp    the same as a table in C++
    resources.txt   registers, spills, stack, shared memory and size of each
and says which variants break triton_src/limits.json; with --strict it fails then. Results are cached by content
(sources, compiler, variant), so a second run takes seconds; ADASPLASH_CUBINS_FROM names a wheel, or the folder of an
installed package, whose kernels are put into that cache first.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

SOURCE = Path(__file__).resolve().parent
LIMITS = json.loads((SOURCE / "limits.json").read_text())

# Set before Triton is imported: no line tables in the machine code, no cache beside ours, and the assembler of CUDA 12
# for all architectures. That of CUDA 13, which Triton would take from sm_90 up, makes code that drivers before 580
# refuse.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"
os.environ.pop("TRITON_INTERPRET", None)

import triton  # noqa: E402
from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from . import launchers  # noqa: E402
from .kept import PARTS, compress, keep, take  # noqa: E402
from .spec import APPENDED  # noqa: E402
from .variants import ARCHS, DEFAULT_ARCHS, SHARED_KIB, variants  # noqa: E402

WAIT = "griddepcontrol.wait"  # in PTX: what a kernel begins with that may be launched early, see lib/waiting.py

FORMAT = "2"  # of what the cache holds; raise it when `compile_variant` changes what it makes of the same variant

# The lowest PTX version that knows an architecture; a driver translates PTX up to its own version. 8.0 is CUDA 12.0,
# which cuLibraryLoadData needs anyway.
PTX_VERSION = {80: 80, 86: 80, 89: 80, 90: 80, 100: 86, 103: 88, 120: 87}


def code_name(arch):
    """sm_90 and above are compiled for exactly one architecture (sm_90a)."""
    return f"sm_{arch}{'a' if arch >= 90 else ''}"


def options(variant, arch):
    return {
        "num_warps": variant.shape.warps,
        "num_stages": variant.shape.stages,
        "maxnreg": variant.shape.registers,
        "enable_fp_fusion": True,
        "ptx_version": PTX_VERSION[arch],
    }


@functools.cache
def sources(module):
    """The files that a kernel's module is made of: its own, and of this package whatever it imports."""
    found, waiting = {}, [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found[name] = Path(importlib.util.find_spec(name).origin)
        package = name.split(".")[: None if found[name].name == "__init__.py" else -1]
        waiting += imported_modules(found[name].read_text(), package)
    return sorted(found.values())


def imported_modules(text, package):
    """The modules of this package that some source text imports, in any form, if it stands in a package [of names]."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            found.append(module)
            if module.split(".")[0] == package[0] and importlib.util.find_spec(module).submodule_search_locations:
                parts = (f"{module}.{alias.name}" for alias in node.names)  # modules, or names in the package's own
                found += [part for part in parts if importlib.util.find_spec(part)]
    return [name for name in found if name.split(".")[0] == package[0]]


def cache_key(variant, arch):
    """All that decides what a variant is compiled to. Its tile shape is in `options` and `constants`."""
    parts = [FORMAT, triton.__version__, knobs.nvidia.ptxas.version, repr(variant), arch, options(variant, arch)]
    parts += [variant.arguments(), variant.divisibility(), variant.constants(arch)]
    parts += [path.read_text() for path in sources(variant.spec.kernel.__module__)]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()


def signature(variant):
    """The types of a kernel's parameters as Triton takes them: of a named tuple as a named tuple of them."""
    types = variant.spec.build(dict(variant.arguments()))
    return {name: types.get(name, "constexpr") for name in variant.spec.kernel.arg_names}


def ptx_arch(archs):
    """The architecture whose PTX is kept: the lowest below 90, as every later GPU's driver can translate it."""
    return min((arch for arch in archs if arch < 90), default=None)


def compile_variant(variant, arch, cache, needs_ptx=False):
    """Compiles one variant unless it is in the cache. Returns (description, from cache)."""
    stored = Path(cache) / cache_key(variant, arch)
    if stored.with_suffix(".json").exists() and (not needs_ptx or stored.with_suffix(".ptx").exists()):
        return json.loads(stored.with_suffix(".json").read_text()) | {"stored": str(stored)}, True
    kernel, divisors = variant.spec.kernel, variant.divisibility()
    attributes = {
        leaf.path: [["tt.divisibility", divisors[leaf.name]]] for leaf in variant.spec.leaves() if leaf.name in divisors
    }
    knobs.nvidia.ptxas_blackwell = knobs.nvidia.ptxas.path
    knobs.nvidia.dump_ptxas_log = True
    log = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(log):
        knobs.cache.dir = folder
        kernel._repr = lambda _: f"adasplash_{variant.name}"  # the symbol, which profilers show
        source = ASTSource(kernel, signature(variant), constexprs=variant.constants(arch), attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(variant, arch))
    metadata = compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise RuntimeError(f"{variant.name}: Triton asks for global scratch memory, which the launchers do not give")

    def usage(pattern):
        return sum(map(int, re.findall(pattern, log.getvalue())))

    description = {
        "name": variant.name,
        "kernel": variant.kernel,
        "arch": arch,
        "symbol": metadata.name,
        "arguments": [*variant.arguments(), *APPENDED],
        "divisibility": variant.divisibility(),
        "constants": variant.constants(arch),
        "dtype": variant.dtype,
        "block_d": variant.block_d,
        "alpha": variant.alpha,
        "gather": variant.gather,
        "hot": variant.hot,
        "entry": variant.entry,
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "registers": usage(r"Used (\d+) registers"),
        "spilled": usage(r"(\d+) bytes spill stores"),
        "stack": usage(r"(\d+) bytes stack frame"),
    }
    contents = {".cubin": compiled.asm["cubin"], ".ptx": compiled.asm["ptx"].encode()}
    keep(stored, contents | {".json": json.dumps(description).encode()})
    return description | {"stored": str(stored)}, False


def compile_all(archs, cache, jobs, taken_from=None):
    tasks = [(variant, arch) for arch in archs for variant in variants(arch)]
    try:
        Path(cache).mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        sys.exit(
            f"AdaSplash: {cache}, where compiled kernels are kept, cannot be written to: set XDG_CACHE_HOME to a "
            "folder that can"
        )
    if taken_from:
        try:
            print(f"{take(taken_from, cache)} variants taken from {taken_from}", flush=True)
        except FileNotFoundError:
            sys.exit(
                f"AdaSplash: ADASPLASH_CUBINS_FROM names {taken_from}, which has no kernels: give the path of a wheel "
                "of torch-adasplash, or of the folder of an installed package"
            )
        except ModuleNotFoundError:
            sys.exit("AdaSplash: with ADASPLASH_CUBINS_FROM the build needs pyelftools: pip install pyelftools")
    done = {}
    cached = 0
    with ProcessPoolExecutor(jobs) as pool:
        portable = ptx_arch(archs)
        futures = {pool.submit(compile_variant, *task, cache, task[1] == portable): task for task in tasks}
        for future in as_completed(futures):
            variant, arch = futures[future]
            description, hit = future.result()
            done[variant.name, arch] = description
            cached += hit
            show_progress(len(done), len(tasks), f"{variant.name} {code_name(arch)}")
    print(f"{len(tasks)} variants, {cached} from the cache", flush=True)
    return [done[variant.name, arch] for variant, arch in tasks]


def show_progress(count, total, what):
    if sys.stderr.isatty():
        filled = 30 * count // total
        end = "\n" if count == total else ""
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r[{bar}] {count}/{total} {what:60.60}", end=end, file=sys.stderr, flush=True)
    elif count % 25 == 0 or count == total:
        print(f"{count}/{total} variants compiled", file=sys.stderr, flush=True)


def broken_limits(descriptions):
    """Sentences about what the limits forbid."""
    for one in descriptions:
        where = f"{one['name']} {code_name(one['arch'])}"
        if one["shared"] > SHARED_KIB[one["arch"]] * 1024:
            yield f"{where}: {one['shared']} bytes of shared memory, the architecture has {SHARED_KIB[one['arch']]} KiB"
        if one["cubin"]["length"] > LIMITS["cubin_bytes"]:
            yield f"{where}: {one['cubin']['length']} bytes of machine code, the limit is {LIMITS['cubin_bytes']}"
        if one["spilled"] > LIMITS["spilled_bytes"][one["entry"] if one["hot"] else "not hot"]:
            yield f"{where}: spills {one['spilled']} bytes"
    default = sum(len(variants(arch)) for arch in DEFAULT_ARCHS)
    if default > LIMITS["default_variants"]:
        yield f"{default} default variants, the limit is {LIMITS['default_variants']}"


def table(descriptions):
    lines = [f"{'variant':44} {'code':7} {'regs':>4} {'spill':>5} {'stack':>5} {'shared':>7} {'bytes':>7}"]
    for one in descriptions:
        lines.append(
            f"{one['name'] + (' *' if one['hot'] else ''):44} {code_name(one['arch']):7} {one['registers']:4} "
            f"{one['spilled']:5} {one['stack']:5} {one['shared']:7} {one['cubin']['length']:7}"
        )
    return "\n".join([*lines, "* hot: has a limit of its own on spills, see limits.json", ""])


def write_if_changed(path, content):
    """Leaves a file that already says this alone, so that what depends on it is not rebuilt."""
    content = content.encode() if isinstance(content, str) else content
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


def compress_code(descriptions, portable, cache, jobs):
    """Says of each variant where its code is: in which file, and where in what that holds. Machine code is in a file of
    its own, so that a first launch decodes no other; PTX, of this architecture, with that of the kernel's other
    variants, as they have most of it in common."""
    kernels = {}
    for one in descriptions:
        if one["arch"] == portable:
            kernels.setdefault(one["kernel"], []).append(one)
    with ProcessPoolExecutor(jobs) as pool:
        waiting = []
        for part, together in [*(("cubin", [one]) for one in descriptions), *(("ptx", of) for of in kernels.values())]:
            text = b""
            for one in together:
                code = Path(one["stored"]).with_suffix(f".{part}").read_bytes()
                one[part] = {"at": len(text), "length": len(code), "sha256": hashlib.sha256(code).hexdigest()}
                text += code
            waiting.append((part, together, pool.submit(compress, text, cache)))
        for part, together, compressed in waiting:
            for one in together:
                one[part]["stored"] = compressed.result()


def write_outputs(descriptions, out, cache, jobs):
    """Lays the code out in cubins.bin, and writes what says where it is."""
    out.mkdir(parents=True, exist_ok=True)
    portable = ptx_arch({one["arch"] for one in descriptions})
    compress_code(descriptions, portable, cache, jobs)
    blob = bytearray()

    @functools.cache
    def place(path):
        offset, content = len(blob), path.read_bytes()
        blob.extend(content)
        return {"offset": offset, "size": len(content)}

    for one in descriptions:
        one["code"] = code_name(one["arch"])
        stored, follows = Path(one.pop("stored")), one.pop("follows", None)
        one["key"] = stored.name
        one["follows"] = WAIT in stored.with_suffix(".ptx").read_text() if follows is None else follows
        for part in PARTS:
            if part in one:
                one[part] |= place(one[part].pop("stored"))
    manifest = {
        "triton": triton.__version__,
        "archs": sorted({one["arch"] for one in descriptions}),
        "ptx_arch": portable,
        "variants": descriptions,
    }
    write_if_changed(out / "cubins.bin", bytes(blob))
    write_if_changed(out / "manifest.json", json.dumps(manifest, indent=1))
    write_if_changed(out / "resources.txt", table(descriptions))
    write_if_changed(out / "variants.cpp", launchers.source(manifest))
    return manifest


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=DEFAULT_ARCHS, choices=ARCHS, metavar="ARCH")
    parser.add_argument("--out", type=Path, required=True)
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))  # shared by all checkouts of a user
    parser.add_argument("--cache", type=Path, default=caches / "torch-adasplash" / "cubins")
    parser.add_argument("--jobs", type=int, default=os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
    parser.add_argument("--table", action="store_true", help="print resources.txt")
    parser.add_argument("--strict", action="store_true", help="fail if a limit is broken")
    args = parser.parse_args()
    header = SOURCE.parent / "csrc" / "cuda" / "launchers.h"
    if header.read_text() != launchers.header():
        sys.exit(f"{header} does not fit the kernels: python -m triton_src.launchers > {header}")
    descriptions = compile_all(sorted(set(args.arch)), args.cache, args.jobs, os.environ.get("ADASPLASH_CUBINS_FROM"))
    write_outputs(descriptions, args.out, args.cache, args.jobs)
    if args.table:
        print((args.out / "resources.txt").read_text(), end="")
    broken = list(broken_limits(descriptions))
    for sentence in broken:
        print(sentence, file=sys.stderr)
    return 1 if broken and args.strict else 0


if __name__ == "__main__":
    sys.exit(main())
