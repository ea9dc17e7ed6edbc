"""Finds tile shapes, warps and stages on the GPU of this machine: python -m triton_src.tune

Compiles every candidate of every kernel exactly as it would be shipped, runs it on sparse and dense inputs, compares
what it writes with what the present table's kernel writes, and prints the times. With --write the fastest of each goes
into the table of variants.py.
"""

import argparse
import ctypes
import itertools
import re
import statistics
import struct
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from bench.lib.case import Case
from bench.lib.inputs import make_grad, make_inputs

from . import variants
from .common import ROOM, TILE, UNLIMITED
from .compile import SOURCE, compile_variant
from .launchers import packing

TABLES = {
    80: "HALF_80",
    86: "HALF_SMALL",
    89: "HALF_SMALL",
    90: "HALF_90",
    100: "HALF_90",
    103: "HALF_90",
    120: "HALF_SMALL",
}
INPUTS = ("structured:0.5", "structured:0.85", "gaussian:1.5")
SHAPE = ("block_m", "block_n", "step", "warps", "stages", "registers", "scan_n")  # the last is attend's alone
MAX_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
WRITTEN = {
    "attend": ("out", "row_state", "tiles"),
    "mark": ("key_marks", "row_marks"),
    "grad_query": ("grad_query", "terms"),
    "grad_key_value": ("grad_key", "grad_value"),
}


class Kernel:
    """A compiled variant, loaded into torch's context."""

    cuda = None

    def __init__(self, variant, cubin):
        if Kernel.cuda is None:
            torch.cuda.init()
            torch.empty(1, device="cuda")
            Kernel.cuda = ctypes.CDLL("libcuda.so.1")
        self.variant = variant
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self.cuda.cuModuleLoadData(ctypes.byref(module), cubin))
        self._check(
            self.cuda.cuModuleGetFunction(ctypes.byref(self._function), module, f"adasplash_{variant.name}".encode())
        )

    def prepare(self, shared):
        self._shared = shared
        self._check(self.cuda.cuFuncSetAttribute(self._function, MAX_SHARED, shared))
        return self

    def _check(self, result):
        if result:
            raise RuntimeError(f"{self.variant}: CUDA error {result}")

    def launch(self, programs, values):
        arguments = [*self.variant.arguments(), *variants.APPENDED]
        data = struct.pack(packing(arguments), *(values.get(name, 0) for name, _ in arguments))
        size = ctypes.c_size_t(len(data))
        buffer = ctypes.create_string_buffer(data, len(data))
        # CU_LAUNCH_PARAM_BUFFER_POINTER, CU_LAUNCH_PARAM_BUFFER_SIZE and CU_LAUNCH_PARAM_END
        extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = self.variant.warps * 32
        self._check(
            self.cuda.cuLaunchKernel(self._function, programs, 1, 1, block, 1, 1, self._shared, stream, None, extra)
        )


class Problem:
    """Tensors of one case, and what the kernels are given."""

    def __init__(self, case):
        self.case = case
        query, key, value = make_inputs(case)
        batch, heads, length, head_dim = query.shape
        tiles = -(-length // TILE.value)
        tile_rows = 2 * -(-tiles // 2)  # as saved_sizes (csrc/attention.cpp) has them
        like = dict(device="cuda")
        self.tensors = {
            "query": query, "key": key, "value": value, "grad_out": make_grad(case), "out": torch.empty_like(query),
            "grad_query": torch.empty_like(query), "grad_key": torch.empty_like(key),
            "grad_value": torch.empty_like(value),
            "row_state": torch.empty(batch, heads, length, 2, **like),
            "terms": torch.empty(batch, heads, length, 4, **like),
            "numbers": torch.empty(batch, heads, 4 * tile_rows, tiles, dtype=torch.int16, **like),
            "lists": torch.empty(batch, heads, tile_rows, tiles, dtype=torch.int32, **like),
            "key_marks": torch.zeros(batch, heads, tile_rows, tiles, 2, dtype=torch.int32, **like),
            "row_marks": torch.zeros(batch, heads, tile_rows, tiles, 4, dtype=torch.int16, **like),
            "shares": torch.tensor([0, 1], dtype=torch.int32, **like).repeat(batch * heads),  # none of one probed key
            "chosen": torch.empty(batch, heads, tile_rows, ROOM.value, dtype=torch.int32, **like),
            "tiles": torch.zeros(
                batch, heads, tile_rows, 2 * -(-length // 4096), dtype=torch.int32, **like
            ),
        }  # fmt: skip
        self.values = {name: x.data_ptr() for name, x in self.tensors.items()}
        for name in ("query", "key", "value", "out", "grad_out", "grad_query", "grad_key", "grad_value"):
            strides = self.tensors[name].stride()
            self.values |= {f"{name}_batch": strides[0], f"{name}_head": strides[1], f"{name}_row": strides[2]}
        self.values |= {
            "state_batch": heads * length, "heads": heads, "group": 1,
            "rows_q": length, "rows_k": length, "key_tile_rows": tile_rows,
            "limit_q": length, "limit_k": length, "tile_rows": tile_rows,
            "tile_words": self.tensors["tiles"].shape[3], "width": head_dim, "width_v": head_dim,
            "window_left": UNLIMITED.value, "window_right": 0 if case.causal else UNLIMITED.value,
            "scale": head_dim**-0.5, "alpha": case.alpha,
        }  # fmt: skip

    def run(self, kernel):
        v = kernel.variant
        side = v.block_n if v.kernel == "grad_key_value" else v.block_m
        values = self.values | {
            "marks": self.values["key_marks" if v.kernel == "grad_query" else "row_marks"],
            "gather_below": 1 if v.kernel == "mark" or v.marked else 0,
        }
        kernel.launch(-(-self.case.length // side) * self.case.batch * self.case.heads, values)


def milliseconds(problem, kernel, times=7):
    """Median of some launches."""
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        problem.run(kernel)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def difference(problem, kernel, exact):
    """The largest difference between what the kernel writes and what the table's kernel wrote, relative; of tile bits
    the share of words, as a weight next to nothing may be none with other sums."""
    for name in exact:
        problem.tensors[name].fill_(0)
    problem.run(kernel)
    worst = 0.0
    for name, x in exact.items():
        if x.is_floating_point():
            y, x = problem.tensors[name].double().nan_to_num(1e30), x.double()
            worst = max(worst, ((y - x).abs().max() / x.abs().max().clamp(min=1e-30)).item())
        else:
            worst = max(worst, (problem.tensors[name] != x).double().mean().item())
    return worst


def candidates(kernel, pad):
    """The shapes to try, as the tables have them."""
    sides = [(64, 64), (32, 64) if kernel == "grad_key_value" else (64, 32)]
    scanned = [(64,), (128,), (256,)] if kernel == "attend" else [()]
    for (m, n), warps, stages, registers, last in itertools.product(
        sides, (4, 8), (1, 2, 3), (None, 128, 168), scanned
    ):
        if warps == 4 or registers is None:  # which eight warps have enough of
            yield m, n, pad, warps, stages, registers, *last


def write(arch, kernel, pad, found):
    """Puts a shape into the architecture's table."""
    path = SOURCE / "variants.py"
    text = path.read_text()
    head, table, rest = re.split(rf"^({TABLES[arch]} = \{{.*)$", text, maxsplit=1, flags=re.M)
    body, end, tail = rest.partition("\n}\n")
    line = f'    ("{kernel}", {pad}): {found},'
    body, count = re.subn(rf'^    \("{kernel}", {pad}\): .*$', line, body, flags=re.M)
    path.write_text(head + table + (body if count else body + "\n" + line) + end + tail)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128], choices=(64, 128, 256))
    parser.add_argument("--kernels", nargs="+", default=list(variants.ATTENTION), choices=list(variants.ATTENTION))
    parser.add_argument("--inputs", nargs="+", default=INPUTS, help="as bench.lib.inputs names them")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=1.5)
    parser.add_argument("--marked", action="store_true", help="of the backward, the code that gathers")
    parser.add_argument("--show", type=int, default=6, help="candidates to print for each kernel")
    parser.add_argument("--write", action="store_true", help="put the fastest into variants.py")
    args = parser.parse_args()
    if args.write and args.alpha not in (1.5, 2.0):
        parser.error("--write knows the tables that alpha = 1.5 and 2 use; those of any alpha are written by hand")
    arch = 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1]
    alpha = {1.5: "1_5", 2.0: "2"}.get(args.alpha, "any")
    base = {
        (v.kernel, v.pad): replace(v, hot=False)  # so that it equals the candidate of its shape
        for v in variants.variants(arch)
        if v.kernel in variants.ATTENTION and v.dtype == "bf16" and v.alpha in ("any", alpha)  # its own come last
        if v.marked == (args.marked and v.kernel in variants.MARKED)
    }
    with tempfile.TemporaryDirectory() as cache, ProcessPoolExecutor() as pool:
        tried = {
            place: list(dict.fromkeys([v, *(
                replace(v, **dict(zip(SHAPE, shape, strict=False)))
                for shape in (candidates(*place) if place[0] in args.kernels else ())
            )]))
            for place, v in base.items()
            if place[1] in args.head_dims
        }  # fmt: skip
        flat = [v for group in tried.values() for v in group]
        futures = [pool.submit(compile_variant, v, arch, cache) for v in flat]
        compiled = {}
        for variant, future in zip(flat, futures, strict=True):
            try:
                about, _ = future.result()
            except Exception as error:  # a shape that Triton refuses
                print(f"{variant.name} {shape_of(variant)}: {str(error).splitlines()[0][:100]}")
                continue
            if about["shared"] <= variants.SHARED_KIB[arch] * 1024:
                cubin = Path(about["stored"]).with_suffix(".cubin").read_bytes()
                compiled[variant] = (Kernel(variant, cubin).prepare(about["shared"]), about)
        for head_dim in args.head_dims:
            tune_head_dim(args, arch, head_dim, tried, compiled)


def shape_of(v):
    """As the tables have it."""
    shape = tuple(getattr(v, name) for name in SHAPE)
    return shape if v.kernel == "attend" else shape[:-1]


def tune_head_dim(args, arch, head_dim, tried, compiled):
    results = {}
    for name in args.inputs:
        case = Case(
            device="cuda",
            input=name,
            heads=args.heads,
            length=args.length,
            head_dim=head_dim,
            dtype="bf16",
            alpha=args.alpha,
        )
        problem = Problem(case)
        for kernel in variants.ATTENTION:
            group = tried[kernel, head_dim]
            problem.run(compiled[group[0]][0])
            exact = {name: problem.tensors[name].clone() for name in WRITTEN[kernel]}
            for variant in group:
                if variant in compiled:
                    this = compiled[variant][0]
                    error = difference(problem, this, exact)
                    results.setdefault((kernel, variant), {})[name] = (
                        milliseconds(problem, this) if error < 2e-2 else float("inf")
                    )
                    if error >= 2e-2:
                        print(f"{variant.name} {shape_of(variant)} {name}: off by {error:.1e}")
            problem.run(compiled[group[0]][0])  # for the kernels after it
    for kernel in args.kernels:
        mine = {v: times for (k, v), times in results.items() if k == kernel}
        ranked = sorted(mine, key=lambda v: sum(mine[v].values()))
        print(f"\n{kernel}, head size {head_dim}, milliseconds: {', '.join(args.inputs)}")
        shown = ranked[: args.show]
        for variant in [*shown, *(v for v in tried[kernel, head_dim][:1] if v not in shown)]:
            about = compiled[variant][1]
            times = "  ".join(f"{mine[variant][name]:7.3f}" for name in args.inputs)
            mark = " (table)" if variant is tried[kernel, head_dim][0] else ""
            print(
                f"  {shape_of(variant)!s:30} {times}   {about['registers']} registers, {about['spilled']} spilled{mark}"
            )
        if args.write:
            write(arch, variants.entry(kernel, ranked[0].marked), head_dim, shape_of(ranked[0]))


if __name__ == "__main__":
    main()
