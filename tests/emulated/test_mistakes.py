"""Mistakes in a launcher, a grid or a manifest, made on purpose: the emulation or the compiler catches each."""

import copy
import ctypes
import itertools
import struct
import subprocess

import pytest
import torch

import reference
from common import ROOT, make_inputs

pytestmark = pytest.mark.backends("emulated")


@pytest.fixture
def driver(backend):
    from emulated import install

    driver = install()
    driver.reset()
    driver.set_place()
    yield driver
    driver.reset()


@pytest.fixture
def tamper(driver, monkeypatch):
    """tamper(function): `function(variant, arguments, programs)` may change what the interpreter is given."""
    from emulated import driver as module

    interpret = module.interpret

    def use(change):
        def changed(variant, arguments, programs):
            arguments = dict(arguments)
            programs = change(variant, arguments, programs) or programs
            interpret(variant, arguments, programs)

        monkeypatch.setattr(module, "interpret", changed)

    return use


seeds = itertools.count()


def roomy(x):
    """The same tensor at the start of a larger block, so that what a mistake makes kernels read exists."""
    block = torch.randn(x.numel() + 100_000).to(x.dtype)
    block[: x.numel()] = x.detach().flatten()
    return block[: x.numel()].view(x.shape)


def is_right():
    """Whether an asymmetric call, forward and backward, still agrees with the reference. Never twice the same numbers:
    what is not written must not look right because it was once."""
    seed = next(seeds)
    inputs = make_inputs(2, 4, 20, 30, size=24, kv_heads=2, value_size=16, seed=seed)  # a tile a head
    grad = torch.randn(2, 4, 20, 16, generator=torch.Generator().manual_seed(seed + 1000))

    def run(function, dtype, prepare):
        leaves = [prepare(x.to(dtype)).requires_grad_() for x in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, prepare(grad.to(dtype)))

    actual = run(lambda *x: torch.ops.adasplash.entmax_attn(*x, 1.5, True), torch.float32, roomy)
    exact = run(lambda *x: reference.attention(*x, 1.5, True).out, torch.float64, torch.clone)
    return all(torch.allclose(a.double(), e, atol=1e-4, rtol=1e-4) for a, e in zip(actual, exact, strict=True))


def test_untampered_it_is_right(driver):
    assert is_right()


@pytest.mark.parametrize(
    "kernel, one, other",
    (
        ("attend", "query.head_stride", "key.head_stride"),
        ("attend", "key.batch_stride", "key.head_stride"),
        ("attend", "key.data", "value.data"),
        ("attend", "call.scores.scale", "call.alpha.number"),
        ("attend", "call.scores.window_left", "call.scores.window_right"),
        ("attend", "value.batch_stride", "value.head_stride"),
        ("grad_query", "call.head_dim", "call.value_dim"),
        ("grad_query", "key.data", "value.data"),
        ("grad_key_value", "grad_out.batch_stride", "grad_out.head_stride"),
        ("grad_key_value", "query.head_stride", "key.head_stride"),
    ),
)
def test_swapped_arguments(tamper, kernel, one, other):
    """Pairs of one type, which the compiler can't tell apart, and whose swap writes nothing out of bounds."""

    def swap(variant, arguments, programs):
        if variant["kernel"] == kernel:
            assert arguments[one] != arguments[other], "the same in this call: nothing to notice"
            arguments[one], arguments[other] = arguments[other], arguments[one]

    tamper(swap)
    assert not is_right()


@pytest.mark.parametrize("kernel", ("attend", "grad_query", "grad_key_value"))
def test_too_few_programs(tamper, kernel):
    tamper(lambda variant, arguments, programs: programs - 1 if variant["kernel"] == kernel else programs)
    assert not is_right()


def with_manifest(driver, monkeypatch, change):
    """The driver reads a changed manifest; kernels that were found before are found again."""
    manifest = copy.deepcopy(driver.manifest)
    for variant in manifest["variants"]:
        change(variant)
    monkeypatch.setattr(driver, "manifest", manifest)
    by_symbol = {(v["symbol"], v["arch"]): v for v in manifest["variants"]}
    kernels = [{**by_symbol[k["symbol"], k["arch"]], "ptx": k["ptx"]} for k in driver.kernels]
    monkeypatch.setattr(driver, "kernels", kernels)


def attend():
    return torch.ops.adasplash.entmax_attn(*make_inputs(1, 1, 20, 6, size=8))


def test_a_dropped_argument(driver, monkeypatch):
    with_manifest(driver, monkeypatch, lambda variant: variant["arguments"].pop(0))
    with pytest.raises(RuntimeError, match=r"cuLaunchKernelEx failed for .* takes \d+ bytes of arguments, got \d+"):
        attend()


def test_a_mistyped_argument(driver, monkeypatch):
    def widen(variant):
        for argument in variant["arguments"]:
            if argument[0] in ("call.heads", "call.group"):
                argument[1] = "i64"

    with_manifest(driver, monkeypatch, widen)
    with pytest.raises(RuntimeError, match=r"takes \d+ bytes of arguments, got \d+"):
        attend()


def test_a_stale_manifest(driver, monkeypatch):
    """Kernels whose arguments were renamed or reordered since the manifest was written."""

    def reorder(variant):
        names = [name for name, _ in variant["arguments"]]
        if "call.heads" not in names:  # an activation
            return
        i, j = names.index("call.queries.rows"), names.index("call.keys.max_seqlen")
        variant["arguments"][i], variant["arguments"][j] = variant["arguments"][j], variant["arguments"][i]

    with_manifest(driver, monkeypatch, reorder)
    with pytest.raises(RuntimeError, match="is it stale"):
        attend()


def test_a_symbol_that_the_manifest_does_not_have(driver, monkeypatch):
    driver.set_place(2)
    monkeypatch.setattr(driver, "manifest", {"variants": []})
    inputs = make_inputs(1, 1, 20, 6, size=200, dtype=torch.float16)  # not loaded by another test on this device
    with pytest.raises(RuntimeError, match=r"cuLibraryGetKernel failed for attend_fp16_d256.*NOT_FOUND"):
        torch.ops.adasplash.entmax_attn(*inputs)


@pytest.mark.parametrize("device, part", ((2, "cubin"), (4, "ptx")))
def test_code_that_is_not_what_was_built(driver, monkeypatch, device, part):
    """As if it had been decoded wrongly, or were another variant's."""

    def change(variant):
        if part in variant:
            variant[part] |= {"sha256": "of something else"}

    with_manifest(driver, monkeypatch, change)
    driver.set_place(device)
    inputs = make_inputs(1, 1, 20, 6, size=200, dtype=torch.float16)  # not loaded by another test on these devices
    with pytest.raises(RuntimeError, match=r"cuLibraryGetKernel failed for attend_fp16_d256.* not the code that was"):
        torch.ops.adasplash.entmax_attn(*inputs)


class Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    ]


@pytest.mark.parametrize(
    "change, error",
    (
        ({}, 0),
        ({"grid": (0, 1, 1)}, 1),
        ({"grid": (1, 0, 1)}, 1),
        ({"block": (2048, 1, 1)}, 1),
        ({"shared": 300 * 1024}, 701),
    ),
)
def test_what_the_stand_in_refuses(driver, change, error):
    from triton_src.launchers import packing

    attend()
    driver.run_kernels = False
    found = ((i, v) for i, v in enumerate(driver.kernels, 1) if v["kernel"] == "attend" and v["arch"] == 90)
    handle, variant = next(found)
    config = Config((1, 1, 1), (variant["warps"] * 32, 1, 1), variant["shared"])
    for name, value in change.items():
        setattr(config, name, type(getattr(config, name))(*value) if isinstance(value, tuple) else value)
    length = struct.calcsize(packing(variant["arguments"]))
    buffer, size = ctypes.create_string_buffer(length), ctypes.c_uint64(length)
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), None)
    driver.library.standin_set_context(1)
    kernel = ctypes.c_void_p(handle)
    assert driver.library.cuLaunchKernelEx(ctypes.byref(config), kernel, None, extra) == error
    driver.run_kernels = True


LAUNCH = """
#include "cuda/launchers.h"
using namespace adasplash::cuda;
void test(const Variant& variant, const Matrix& rows, const MutableMatrix& out, float* floats, int32_t* words,
          int16_t* margins, const Scores& scores) {
  const Sequences sequences{.lengths = static_cast<const int32_t*>(words), .lengths_kind = int32_t{0},
      .rows = int32_t{1}, .max_seqlen = int32_t{1}, .tile_rows = int32_t{2}};
  const Call call{.queries = sequences, .keys = sequences,
      .alpha = {.per_head = static_cast<const float*>(floats), .source = int32_t{0}, .number = 1.5f},
      .scores = scores,
      .dropout = {.seed = static_cast<const int64_t*>(nullptr), .threshold = int32_t{0}, .scale = 1.f,
                  .first_batch = int32_t{0}, .first_head = int32_t{0},
                  .origins = static_cast<const int32_t*>(nullptr), .has_origins = int32_t{0}},
      .state_batch_stride = int64_t{1}, .heads = int32_t{1}, .group = int32_t{1},
      .tile_words = int32_t{2}, .head_dim = int32_t{8}, .value_dim = int32_t{8},
      .few_queries = int32_t{-1}};
  attend(variant, Place{0, nullptr}, 1, {
      .query = rows, .key = rows, .value = rows, .out = out, .row_state = floats, .support = words, .tiles = words,
      .support_capacity = int32_t{0},
      .tile_margins = margins, .tile_lists = words, .remaining = words, .gathered = words,
      .gather_from = int32_t{1}, .gather_below = int32_t{1}, .call = call});
  activate(variant, Place{0, nullptr}, 1, {
      .input = static_cast<const void*>(floats), .out = static_cast<void*>(floats),
      .row_alpha = static_cast<const float*>(floats), .own_alphas = int64_t{1}, .rows = int64_t{1},
      .length = int32_t{1}, .alpha = 1.5f});
}
"""


@pytest.mark.parametrize(
    "old, new",
    (
        (None, None),
        (".tile_margins = margins,", ""),
        (".keys = sequences,", ""),
        (".keys = sequences", ".keys = scores"),
        (".rows = int64_t{1}", ".rows = 1"),
        (".row_state = floats, .support = words", ".support = words, .row_state = floats"),
        (".tile_margins = margins", ".tile_margins = floats"),
    ),
    ids=("right", "dropped", "dropped-group", "mistyped-group", "narrow", "swapped", "mistyped"),
)
def test_the_compiler_refuses_wrong_arguments(tmp_path, old, new):
    source = tmp_path / "launch.cpp"
    source.write_text(LAUNCH.replace(old, new) if old else LAUNCH)
    include = f"{torch.__path__[0]}/include"
    command = ["g++", "-std=c++20", "-fsyntax-only", "-I", ROOT / "csrc", "-isystem", include, source]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == (old is None), done.stderr
