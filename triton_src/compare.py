"""Compares the kernels of two checkouts: python -m triton_src.compare OLD NEW --arch 80 90

Each checkout compiles its variants by its own triton_src.compile, with the compiler of this Python, into a cache of its
own, so that a second run takes seconds. Two variants of one name are the same if their PTX is, but for what
`normalised` takes away, and if the assembler made as many registers, spills, stack and shared memory of it. Says which
are not, with --show how the PTX of the first of them differs; the exit status is 1 if there are any.

The assembler sees the order of parameters, too: where only that changed a few bytes of spills may, with the same PTX.
"""

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

RESOURCES = ("warps", "shared", "registers", "spilled", "stack")

# What arguments were called before they were parts of named tuples; the strides of tensors, query_row and so on, are
# in `current_name`. Only a comparison with a checkout from before that needs them: drop both once none is of use.
RENAMED = {
    "numbers": "tile_margins",
    "lists": "tile_lists",
    "shares": "probe_counts",
    "terms": "row_terms",
    "chosen": "gathered",
    "lengths_q": "call.queries.lengths",
    "kind_q": "call.queries.lengths_kind",
    "rows_q": "call.queries.rows",
    "limit_q": "call.queries.max_seqlen",
    "tile_rows": "call.queries.tile_rows",
    "lengths_k": "call.keys.lengths",
    "kind_k": "call.keys.lengths_kind",
    "rows_k": "call.keys.rows",
    "limit_k": "call.keys.max_seqlen",
    "key_tile_rows": "call.keys.tile_rows",
    "alphas": "call.alpha.per_head",
    "kind_alpha": "call.alpha.source",
    "alpha": "call.alpha.number",
    "slopes": "call.scores.slopes",
    "slopes_batch": "call.scores.slopes_batch_stride",
    "has_slopes": "call.scores.has_slopes",
    "scale": "call.scores.scale",
    "window_left": "call.scores.window_left",
    "window_right": "call.scores.window_right",
    "state_batch": "call.state_batch_stride",
    "heads": "call.heads",
    "group": "call.group",
    "tile_words": "call.tile_words",
    "width": "call.head_dim",
    "width_v": "call.value_dim",
}

COMPILE = """
import json, sys
from triton_src.compile import compile_all
file, cache, jobs, *archs = sys.argv[1:]
with open(file, "w") as out:
    json.dump(compile_all([int(arch) for arch in archs], cache, int(jobs)), out)
"""


def compiled(checkout, archs, cache, jobs):
    """{(name, architecture): description} of a checkout's variants."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "variants.json"
        arguments = [file, cache, jobs, *archs]
        subprocess.run([sys.executable, "-c", COMPILE, *map(str, arguments)], cwd=checkout, check=True)
        return {(one["name"], one["arch"]): one for one in json.loads(file.read_text())}


def current_name(name, names):
    """What an argument is called today, of which `names` are all of a kernel's."""
    if "heads" not in names:  # of a checkout whose arguments are grouped already, or of an activation
        return name
    if name in RENAMED:
        return RENAMED[name]
    tensor, _, stride = name.rpartition("_")
    if stride in ("batch", "head", "row") and tensor in names:
        return f"{tensor}.{stride}_stride"
    return f"{name}.data" if f"{name}_row" in names else name


REGISTER = re.compile(r"%(?:p|rs|rd|r|fd|f)\d+\b")
OF_PARAMETER = re.compile(r"\s*ld\.param\.\w+\s+(%\w+), \[entry_param_(\d+)\];")
COMMUTES = re.compile(r"(\s*(?:@!?%p\d+ )?(?:add|mul|and|or|xor|min|max)\.[\w.]+\s+)(%\w+), (%\w+), (\S+);")


def normalised(ptx, description):
    """The lines of a variant's PTX without what a kernel's names and the order of its parameters decide:

    - comments, the kernel's name, the declarations of parameters and registers are gone;
    - a register that a parameter is loaded into is called by the parameter's name, and the load is gone: parameters do
      not change, so that where they are loaded says nothing;
    - other registers are numbered in the order in which they appear, but for the operands of the next rule;
    - the two operands of an instruction that commutes are sorted: LLVM orders them by where parameters stand.

    The order of all other instructions, and everything in them, is compared."""
    names = [name for name, _ in description["arguments"]]
    called, lines = {}, []
    for line in ptx.replace(description["symbol"], "entry").splitlines():
        line = line.partition("//")[0].rstrip()
        if load := OF_PARAMETER.match(line):
            name = f"<{current_name(names[int(load[2])], names)}>"
            if called.setdefault(load[1], name) != name:
                raise ValueError(f"{description['name']}: {load[1]} is loaded from two parameters")
        elif line and ".param " not in line and not line.lstrip().startswith(".reg "):
            lines.append(line)
    if any("entry_param" in line for line in lines):
        raise ValueError(f"{description['name']}: uses its parameters in a way that this does not know")

    def number(line):
        for register in REGISTER.findall(line):
            if register not in called:
                called[register] = f"{register.strip('%0123456789')}.{len(called)}"

    commuting = [COMMUTES.match(line) for line in lines]
    for line, commutes in zip(lines, commuting, strict=True):
        number(commutes[1] + commutes[2] if commutes else line)
    found = []
    for line, commutes in zip(lines, commuting, strict=True):
        if commutes:
            operands = sorted(commutes.groups()[2:], key=lambda operand: called.get(operand, operand))
            line = f"{commutes[1]}{commutes[2]}, {', '.join(operands)};"
        found.append(REGISTER.sub(lambda register: called.get(register[0], register[0]), line))
    return found


def differences(old, new):
    """How two variants differ: (words about what the assembler made of them, lines about their PTX)."""
    resources = [f"{what} {old[what]}, now {new[what]}" for what in RESOURCES if old[what] != new[what]]
    lines = [normalised(Path(one["stored"]).with_suffix(".ptx").read_text(), one) for one in (old, new)]
    return resources, list(difflib.unified_diff(*lines, "old", "new", lineterm="", n=2)) if lines[0] != lines[1] else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout")
    parser.add_argument("new", type=Path, help="another")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], metavar="ARCH")
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--cache", type=Path, default=caches / "torch-adasplash" / "compare")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--show", type=int, default=0, metavar="LINES", help="of the first variant that differs")
    args = parser.parse_args()
    old, new = (
        compiled(checkout.resolve(), args.arch, (args.cache / side).resolve(), args.jobs)
        for checkout, side in ((args.old, "old"), (args.new, "new"))
    )
    for name, arch in sorted(old.keys() ^ new.keys()):
        print(f"{name} sm_{arch}: only in {args.old if (name, arch) in old else args.new}")
    both = [key for key in old if key in new]
    with ProcessPoolExecutor(args.jobs) as pool:
        found = pool.map(differences, (old[key] for key in both), (new[key] for key in both), chunksize=8)
        found = list(found)
    for (name, arch), (resources, lines) in zip(both, found, strict=True):
        if resources or lines:
            print(f"{name} sm_{arch}: {'other' if lines else 'the same'} PTX; {'; '.join(resources)}")
    first = next((lines for _, lines in found if lines), [])
    print("".join(f"{line}\n" for line in first[: args.show]), end="")
    same_ptx, same = (sum(not lines for _, lines in found), sum(not any(one) for one in found))
    print(f"{len(both)} variants in both: the PTX of {same_ptx} is the same, and of {same} all")
    return 1 if same < len(both) or old.keys() != new.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
