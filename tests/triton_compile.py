"""Compile the Triton kernels for a GPU that is not there and print what ptxas made of them, as JSON lines.

    PYTHONPATH=kernels python tests/triton_compile.py

Needs triton, whose wheel carries ptxas, and no GPU. `TRITON_INTERPRET` must not be set.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trd_kernels import triton_kernels as kernels
from trd_kernels.divergence import DIVERGENCES

WARPS = 8
LANES = 1024
POINTER = {"label_ptr": "*i64", "grad_ptr": "*bf16"}
SCALAR = {"scale": "fp32", "beta": "fp32", "clip": "fp32"}
# Blocks start on aligned addresses and their rows too; the number of rows is never specialised on.
ALIGNED = re.compile(r".*_ptr|stride_.+|num_columns")


def variants() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield a name, a kernel and its constants for all that the launches can ask for on a GPU."""
    nothing = dict.fromkeys(("DELTA_S", "DELTA_T", "ENTROPY_S", "ENTROPY_T", "ARGMAX", "LABEL"), False)
    yield "sums", kernels.softmax_sums_kernel, nothing
    yield "sums-all", kernels.softmax_sums_kernel, dict.fromkeys(nothing, True)
    yield "spread", kernels.spread_kernel, {}
    first, second = {"VALUE": True, "EXTRA": True}, {"VALUE": False, "EXTRA": False}
    for kind, name in enumerate(DIVERGENCES):
        clips = (False, True) if name == "forward_kl" else (False,)
        for clip in clips:
            base = {"KIND": kind, "CLIP": clip, "NEAR_HALF": name != "mixed"}
            label = f"{name}{'-clip' if clip else ''}"
            if name == "jsd" or clip:
                yield f"{label}-extra", kernels.divergence_kernel, base | first | {"GRADIENT": False}
                yield f"{label}-grad", kernels.divergence_kernel, base | second | {"GRADIENT": True}
            else:
                yield f"{label}-grad", kernels.divergence_kernel, base | second | {"VALUE": True, "GRADIENT": True}


def compile_for(capability: int, kernel: Any, constants: dict[str, Any]) -> dict[str, Any]:
    """Return registers, spilled bytes and the widths of global loads of one variant."""
    constants = {**constants, "ROWS": 1, "LANES": LANES}
    signature, places, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name], places[(i,)] = "constexpr", constants[name]
            continue
        default = "*fp32" if name.endswith("_ptr") else "i32"
        signature[name] = POINTER.get(name, SCALAR.get(name, default))
        if ALIGNED.fullmatch(name):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=places, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": WARPS})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL"))
    loads = re.findall(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b32", compiled.asm["ptx"])
    return {"registers": registers, "spilled": stack + local, "widest_load": max(int(x or 1) for x in loads) * 4}


def main() -> None:
    """Print one line per variant."""
    for name, kernel, constants in variants():
        found = compile_for(int(sys.argv[1]) if len(sys.argv) > 1 else 90, kernel, constants)
        print(json.dumps({"kernel": name, **found}))


if __name__ == "__main__":
    main()
