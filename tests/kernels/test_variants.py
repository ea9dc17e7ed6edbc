"""What is compiled ahead of time: the table of variants, the generated C++, and the machine code in the library."""

import hashlib
import io
import json
import lzma
import os
import struct
import subprocess
import sys
import zipfile

import pytest
from elftools.elf.elffile import ELFFile

import adasplash
from common import ROOT, run

sys.path.append(str(ROOT))
FOLDER = os.path.join(adasplash.cmake_prefix_path, "lib", "adasplash")
pytestmark = pytest.mark.backends("cpu")


@pytest.fixture(scope="module")
def manifest():
    path = os.path.join(FOLDER, "manifest.json")
    if not os.path.exists(path):
        pytest.skip("this library was built without GPU kernels (ADASPLASH_ARCHS=none)")
    with open(path) as file:
        return json.load(file)


@pytest.fixture(scope="module")
def outside():
    """The environment of a process that compiles: no interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory, outside):
    """What `triton_src.compile` writes for the default architectures: from the cache where the library was built."""
    out = tmp_path_factory.mktemp("cubins")
    run(sys.executable, "-m", "triton_src.compile", "--arch", 80, 90, "--out", out, cwd=ROOT, env=outside)
    return out


@pytest.mark.slow
def test_every_default_variant_compiles_within_the_limits(compiled):
    """The compiler only says which limits are broken, so that they stop nobody's build; here they count."""
    from triton_src.variants import DEFAULT_ARCHS, SHARED_KIB, variants

    limits = json.loads((ROOT / "triton_src" / "limits.json").read_text())
    manifest = json.loads((compiled / "manifest.json").read_text())
    found = {(one["name"], one["arch"]): one for one in manifest["variants"]}
    assert set(found) == {(variant.name, arch) for arch in DEFAULT_ARCHS for variant in variants(arch)}
    assert len(found) <= limits["default_variants"]
    assert (compiled / "cubins.bin").stat().st_size < 14e6
    for one in found.values():
        assert one["registers"] > 0 and one["cubin"]["length"] <= limits["cubin_bytes"], one["name"]
        assert one["shared"] <= SHARED_KIB[one["arch"]] * 1024, one["name"]
        limit = limits["spilled_bytes"][one["entry"] if one["hot"] else "not hot"]
        assert one["spilled"] <= limit, one["name"]
    assert sum(one["hot"] for one in found.values()) == 176


@pytest.mark.slow
def test_a_second_run_comes_from_the_cache(compiled, outside):
    done = run(sys.executable, "-m", "triton_src.compile", "--out", compiled, cwd=ROOT, env=outside)
    from triton_src.variants import DEFAULT_ARCHS, variants

    count = sum(len(variants(arch)) for arch in DEFAULT_ARCHS)
    assert f"{count} variants, {count} from the cache" in done.stdout


def wheel_of(compiled, library, folder):
    """A wheel that has these kernels in this library, and nothing else."""
    (folder / "cubins.s").write_text(
        ".section .rodata\n.globl adasplash_cubins\n.type adasplash_cubins, %object\nadasplash_cubins:\n"
        f'.incbin "{compiled}/cubins.bin"\n.size adasplash_cubins, .-adasplash_cubins\n'
    )
    run("g++", "-shared", "-nostdlib", folder / "cubins.s", "-o", folder / "library.so")
    with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        archive.write(compiled / "manifest.json", "adasplash/lib/adasplash/manifest.json")
        archive.write(folder / "library.so", f"adasplash/lib/{library}")
    return folder / "some.whl"


@pytest.mark.slow
@pytest.mark.parametrize("library", ("libadasplash_kernels.so", "torch2.13/libadasplash.so"))
def test_kernels_are_taken_from_a_wheel(compiled, outside, tmp_path, library):
    """From the library that several releases of torch share, in a wheel, or from the only one, in a folder: into an
    empty cache, from which then the same is made."""
    place = wheel_of(compiled, library, tmp_path)
    if library != "libadasplash_kernels.so":
        zipfile.ZipFile(place).extractall(tmp_path / "site")
        place = tmp_path / "site" / "adasplash"
    options = ["--arch", 80, 90, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    environment = {**outside, "ADASPLASH_CUBINS_FROM": str(place)}
    done = run(sys.executable, "-m", "triton_src.compile", *options, cwd=ROOT, env=environment)
    count = len(json.loads((compiled / "manifest.json").read_text())["variants"])
    assert f"{count} variants taken from {place}" in done.stdout
    assert f"{count} variants, {count} from the cache" in done.stdout
    for name in ("cubins.bin", "manifest.json", "resources.txt", "variants.cpp"):
        assert (tmp_path / "out" / name).read_bytes() == (compiled / name).read_bytes()


def test_ptx_that_a_wheel_has_not_is_compiled_for(outside, tmp_path):
    """A wheel has PTX of its lowest architecture only: where that of another is needed, its kernels are compiled."""
    code = """
import sys
from pathlib import Path
from triton_src import compile, variants
variant = next(v for v in variants.variants(86) if v.kernel == "append")
stored = Path(compile.compile_variant(variant, 86, sys.argv[1])[0]["stored"])
stored.with_suffix(".ptx").unlink()
for needs_ptx, cached in ((False, True), (True, False), (True, True)):
    assert compile.compile_variant(variant, 86, sys.argv[1], needs_ptx)[1] == cached, needs_ptx
assert stored.with_suffix(".ptx").exists()
"""
    run(sys.executable, "-c", code, tmp_path, cwd=ROOT, env=outside)


@pytest.mark.parametrize("there", (False, True), ids=("nothing", "no kernels"))
def test_a_wheel_without_kernels_is_refused(outside, tmp_path, there):
    if there:
        zipfile.ZipFile(tmp_path / "some.whl", "w").close()
    command = [sys.executable, "-m", "triton_src.compile", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    environment = {**outside, "ADASPLASH_CUBINS_FROM": str(tmp_path / "some.whl")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.startswith("AdaSplash: ADASPLASH_CUBINS_FROM names ")


def test_taking_kernels_needs_pyelftools(compiled, outside, tmp_path):
    place = wheel_of(compiled, "libadasplash_kernels.so", tmp_path)
    (tmp_path / "elftools.py").touch()  # a module of that name with nothing in it
    command = [sys.executable, "-m", "triton_src.compile", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
    environment = {**outside, "ADASPLASH_CUBINS_FROM": str(place), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    [line] = done.stderr.splitlines()
    assert done.returncode == 1 and line.endswith("the build needs pyelftools: pip install pyelftools")


@pytest.mark.builds
@pytest.mark.parametrize("arch", (86, 100))
def test_other_architectures_compile(tmp_path, outside, arch):
    """One variant of each kernel, where all of them would take minutes: the one with the most shared memory."""
    code = f"""
import sys
from triton_src import compile, variants
largest = [v for v in variants.variants({arch}) if "bf16_d256_aany" in v.name]
assert len(largest) == 24, [v.name for v in largest]
for variant in largest:
    one, _ = compile.compile_variant(variant, {arch}, sys.argv[1])
    assert one["shared"] <= variants.SHARED_KIB[{arch}] * 1024, one["name"]
"""
    run(sys.executable, "-c", code, tmp_path, cwd=ROOT, env=outside)


def test_tables_are_consistent():
    from triton_src.variants import ARCHS, ATTENTION, variants

    few = [name for name, spec in ATTENTION.items() if "few" in spec.arguments]
    for arch in ARCHS:
        table = {variant.name: variant for variant in variants(arch) if variant.kernel in ATTENTION}
        for variant in table.values():
            shape = variant.shape
            sides = (shape.block_m, shape.block_n)
            if variant.kernel in few:
                assert sides == (8 if "scan_index" in variant.kernel else 16, 64), variant.name
                assert shape.scan_n is None, variant.name
                continue
            walked = 0 if variant.kernel == "grad_key_value" else 1
            for side, length in enumerate(sides):
                assert 64 % length == 0 if side == walked else length == 64, variant.name
            assert variant.block_d % shape.step_d == 0
            assert (shape.scan_n is not None) == variant.kernel.startswith("attend")
            assert shape.scan_n in (None, 64, 128, 256), variant.name
            assert not shape.ahead or (variant.kernel.startswith("attend") and not variant.gather), variant.name


def test_the_tuner_knows_all_arguments_of_what_it_tunes():
    from bench.lib.case import Case
    from triton_src import tune, variants
    from triton_src.spec import APPENDED

    known = tune.Problem(Case(device="cpu", heads=1, length=64)).values
    for name in tune.TUNED:
        leaves = {leaf.name for leaf in variants.KERNELS[name].leaves()} | {name for name, _ in APPENDED}
        assert leaves <= known.keys(), (name, leaves - known.keys())


def test_tile_shapes_are_written_as_they_are_read():
    """What the tuner writes differs from the file in nothing but the shapes it found."""
    from dataclasses import replace

    from triton_src.variants import TILES, attention_shape, format_shapes, put_shape, shape_table, variants

    text = TILES.read_text()
    assert format_shapes(json.loads(text)) == text
    variant = next(v for v in variants(90) if v.name == "grad_query_bf16_d64_a1_5_marked")
    assert variant.shape == attention_shape(90, "grad_query", "bf16", 64, "1_5", True)
    data = json.loads(text)
    put_shape(data, 90, replace(variant, shape=replace(variant.shape, warps=32)))
    changed = [
        pair for pair in zip(text.splitlines(), format_shapes(data).splitlines(), strict=True) if len({*pair}) > 1
    ]
    assert [(old.replace(f'"warps": {variant.shape.warps}', '"warps": 32'), new) for old, new in changed] == [
        (new, new) for _, new in changed
    ]
    assert len(changed) == 1
    line = json.loads(changed[0][1].rstrip(","))
    assert line in shape_table(data, 90, "bf16", "1_5")["shapes"]


def test_what_a_spec_must_say():
    """Arguments are those of the kernel, and what is written is among them."""
    from dataclasses import replace

    from triton_src.variants import KERNELS

    for spec in KERNELS.values():
        with pytest.raises(ValueError, match="are not the kernel's parameters"):
            replace(spec, arguments=dict(reversed(spec.arguments.items())))
        with pytest.raises(ValueError, match="of what is no argument"):
            replace(spec, writes=(*spec.writes, "nothing"))


@pytest.mark.parametrize(
    "kernel, files",
    (
        ("attend", {"spec.py", "forward.py", "scores.py", "tile_lists.py"}),
        ("append", {"spec.py", "cache.py", "matrices.py"}),
        ("grad_key_value", {"grad_key_value.py", "grad_query.py", "marks.py", "entmax.py"}),
        ("activate", {"activation.py", "entmax.py", "matrices.py"}),
    ),
)
def test_the_cache_knows_all_that_a_kernel_is_made_of(outside, kernel, files):
    code = f"""
from triton_src.compile import sources
from triton_src.variants import KERNELS
print(*(path.name for path in sources(KERNELS[{kernel!r}].kernel.__module__)))
"""
    found = set(run(sys.executable, "-c", code, cwd=ROOT, env=outside).stdout.split())
    assert files <= found and not found & {"compile.py", "variants.py", "tune.py"}
    assert ("mark.py" in found) == (kernel == "mark")


def test_the_cache_follows_every_form_of_import(outside):
    code = """
from triton_src.compile import imported_modules
text = '''
import math, triton_src.launchers
import triton.language as tl
from . import matrices
from .. import spec, KERNELS
from ..attention.mark import mark
from triton_src.lib import call
from triton_src.variants import KERNELS
'''
print(*imported_modules(text, ["triton_src", "lib"]))
"""
    found = set(run(sys.executable, "-c", code, cwd=ROOT, env=outside).stdout.split())
    names = ("launchers", "lib", "lib.matrices", "spec", "attention.mark", "lib.call", "variants")
    assert found == {"triton_src", *(f"triton_src.{name}" for name in names)}


def test_rows_of_activations_fit():
    from triton_src.variants import DEFAULT_ARCHS, LONGEST_ROW, shapes, variants

    table = [v for v in variants(DEFAULT_ARCHS[0]) if v.kernel.startswith("activate")]
    assert {v.block_d for v in table} == {line["longest_row"] or LONGEST_ROW for line in shapes()["activation"]}
    for variant in table:
        if variant.block_d == LONGEST_ROW:
            assert variant.constants(DEFAULT_ARCHS[0])["LONG"] and variant.shape.block_m == 1
        else:
            assert not variant.constants(DEFAULT_ARCHS[0])["LONG"] and variant.block_d == variant.shape.block_n


def test_kernels_that_follow_wait_first():
    """Before they touch memory or return: so that the end of a launch means that all before it have ended."""
    import ast
    import inspect
    import textwrap

    from triton_src.variants import KERNELS

    followers = 0
    for name, spec in KERNELS.items():
        (function,) = ast.parse(textwrap.dedent(inspect.getsource(spec.kernel.fn))).body
        statements = [ast.unparse(statement) for statement in function.body[1:]]  # behind the docstring
        if any("follow(" in statement for statement in statements):
            followers += 1
            assert "follow(ARCH)" in statements[: 2 if statements[0] == "lead(ARCH)" else 1], name
    assert followers >= 6


def test_the_generated_header_is_current(outside):
    done = run(sys.executable, "-m", "triton_src.launchers", cwd=ROOT, env=outside)
    assert done.stdout == (ROOT / "csrc" / "cuda" / "launchers.h").read_text()


def test_the_installed_manifest_is_current(manifest):
    from triton_src.spec import APPENDED
    from triton_src.variants import variants

    for one in manifest["variants"]:
        variant = next(v for v in variants(one["arch"]) if v.name == one["name"])
        assert [tuple(a) for a in one["arguments"]] == [*variant.arguments(), *APPENDED], one["name"]
        assert one["constants"] == variant.constants(one["arch"]), one["name"]


def parameters(cubin: bytes, symbol: str) -> list[tuple[int, int]]:
    """(offset, size) of a kernel's parameters, as its machine code says (section .nv.info.<symbol>)."""
    about = ELFFile(io.BytesIO(cubin)).get_section_by_name(f".nv.info.{symbol}").data()
    found, at = {}, 0
    while at < len(about):
        kind, attribute, value = struct.unpack_from("<BBH", about, at)
        at += 4
        if kind == 4:  # a value of its own size
            if attribute == 0x17:  # one parameter
                _, ordinal, offset, flags = struct.unpack_from("<IHHI", about, at)
                found[ordinal] = (offset, flags >> 18)
            at += value
    return [found[ordinal] for ordinal in sorted(found)]


def code_of(compiled, part):
    """{(name, architecture): (what the manifest says, its code)} of the variants that have this part, decoded."""
    from triton_src.kept import LZMA

    code, texts, found = (compiled / "cubins.bin").read_bytes(), {}, {}
    for one in json.loads((compiled / "manifest.json").read_text())["variants"]:
        if place := one.get(part):
            start = place["offset"]
            if start not in texts:
                small = code[start:][: place["size"]]
                texts[start] = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA).decompress(small)
            found[one["name"], one["arch"]] = one, texts[start][place["at"] :][: place["length"]]
    return found


@pytest.mark.parametrize("part", ("cubin", "ptx"))
def test_code_is_kept_compressed(compiled, part):
    """PTX of the lowest architecture only; the library's own decoder meets both in the emulation."""
    found = code_of(compiled, part)
    assert {arch for _, arch in found} == ({80, 90} if part == "cubin" else {80})
    for one, own in found.values():
        assert hashlib.sha256(own).hexdigest() == one[part]["sha256"]
        if part == "ptx":
            assert b"\0" not in own and own.count(f".entry {one['symbol']}(".encode()) == own.count(b".entry ") == 1
        else:
            assert own.startswith(b"\x7fELF") and f".text.{one['symbol']}\0".encode() in own
            assert one["cubin"]["at"] == 0  # alone, as a first launch waits for the decoder


def test_arguments_lie_where_the_machine_code_reads_them(compiled):
    """The struct that C++ packs has each field where the kernel's parameter is, in every variant."""
    sizes = {"i32": "i", "i64": "q", "fp32": "f"}
    for one, cubin in code_of(compiled, "cubin").values():
        layout, expected = "@", []
        for _, kind in one["arguments"]:
            letter = "P" if kind.startswith("*") else sizes[kind]
            layout += letter
            end = struct.calcsize(layout)
            expected.append((end - struct.calcsize(letter), struct.calcsize(letter)))
        assert parameters(cubin, one["symbol"]) == expected, one["name"]
