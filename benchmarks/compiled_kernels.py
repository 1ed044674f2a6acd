"""
What Triton's compiler makes of the kernels for a GPU, which need not be there.

    python benchmarks/compiled_kernels.py                    # needs Triton and no GPU: pip install triton
    python benchmarks/compiled_kernels.py --capability 80
    python benchmarks/compiled_kernels.py --floats fp64      # in a compiled model, before PyTorch 2.15

For each kernel: registers of a thread, what it spills to memory, the instructions that a thread executes for a logit
(of each model), and how many in its code calculate in fp64. It says nothing about time: that depends on memory and
matrix products too, see benchmarks/loss.py. The kernels of TRL's fused SFT head stand beside ours: the forward one and
`statistics` read all logits, for one distribution there and for three here; the backward one and `gradient` overwrite
them.
"""

import argparse
import itertools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from trl.kernels import chunked_logprob

from wmss_trl.losses import triton_tiles as kernels

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_WARPS = 4


class Compiled(NamedTuple):
    registers: int
    spilled_bytes: int
    instructions_per_logit: float
    fp64_instructions: int


def compile_kernel(kernel: triton.JITFunction, dtype: str, capability: int, floats: str, **constants: Any) -> Compiled:
    """Compile a kernel that reads logits in `dtype` for a vocabulary that is a multiple of 16, and that is passed
    Python floats as `floats`."""
    types = {"targets_ptr": "*i64", "is_top1_ptr": "*i1"}
    types |= dict.fromkeys(("strong_ptr", "weak_ptr", "mm_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("stride", "mm_stride", "vocab_size", "n_cols", "vocab_start"), "i32")
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "*fp32" if name.endswith("_ptr") else floats)
        if signature[name] != floats:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": _WARPS})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    number = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    logits_per_thread = constants["BLOCK_SIZE"] / (32 * _WARPS)
    return Compiled(
        number["REG"],
        number["STACK"] + number["LOCAL"],
        _block_length(code) / logits_per_thread,
        len(re.findall(r"\bD(?:ADD|MUL|FMA|SETP)\b", code)),
    )


def _block_length(code: str) -> int:
    """Instructions from the top of the longest loop to its end, or of everything where there is no loop."""
    labels, length, longest = {}, 0, 0
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = length
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            length += "NOP" not in instruction[1]
            target = re.search(r"BRA.*?(\.L_\w+)", instruction[1])
            # The jump of a program to itself that ends every kernel is no loop
            if target and length - labels.get(target[1], length) > 1:
                longest = max(longest, length - labels[target[1]])
    return longest or length


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def ours(dtype: str, capability: int, floats: str) -> dict[str, Compiled]:
    """Every variant of the kernels of the mixed loss."""
    results = {}
    for softcap, moments in itertools.product((False, True), repeat=2):
        constants = {"STRONG_HAS_SOFTCAP": softcap, "WEAK_HAS_SOFTCAP": softcap, "HAS_MOMENTS": moments}
        constants |= {"BLOCK_SIZE": kernels._BLOCK_SIZE, "LANE_WIDTH": kernels._LANE_WIDTH}
        name = "statistics" + ", softcap" * softcap + ", logit statistics" * moments
        results[name] = compile_kernel(kernels._statistics_kernel, dtype, capability, floats, **constants)
    for softcap, anchor, dft, weak in itertools.product((False, True), repeat=4):
        constants = {"STRONG_HAS_SOFTCAP": softcap, "WEAK_HAS_SOFTCAP": softcap, "HAS_ANCHOR": anchor, "IS_DFT": dft}
        constants |= {"NEEDS_WEAK": weak, "BLOCK_SIZE": kernels._BLOCK_SIZE}
        name = "gradient" + ", softcap" * softcap + ", anchored" * anchor + ", dft" * dft
        name += ", of the weak model too" * weak
        results[name] = compile_kernel(kernels._gradient_kernel, dtype, capability, floats, **constants)
    return results


def trl(dtype: str, capability: int, floats: str) -> dict[str, Compiled]:
    """The kernels of TRL's fused SFT head, as SFTTrainer uses them."""
    constants = {"HAS_SOFTCAP": False, "BLOCK_SIZE": chunked_logprob._BLOCK_SIZE}
    outputs = {"HAS_ENTROPY": True, "HAS_LOG_SUM_SQ_PROBS": False, "HAS_MEAN_LOGITS": False, "HAS_IS_TOP1": True}
    gradients = {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": False}
    return {
        "TRL's forward": compile_kernel(
            chunked_logprob._forward_kernel, dtype, capability, floats, **constants, **outputs
        ),
        "TRL's backward": compile_kernel(
            chunked_logprob._backward_kernel, dtype, capability, floats, **constants, **gradients
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80: A100, 89: L40, 90: H100, 100: B200.")
    parser.add_argument("--dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument(
        "--floats",
        default="fp32",
        choices=["fp32", "fp64"],
        help="As which dtype the kernels are passed Python floats.",
    )
    args = parser.parse_args()
    print(f"triton {triton.__version__}, sm_{args.capability}, {args.dtype}", end="\n\n")
    columns = ["kernel", "registers", "spilled, bytes", "instructions per logit", "in fp64"]
    print(f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", sep="\n")
    compiled_for = args.dtype, args.capability, args.floats
    for name, result in (trl(*compiled_for) | ours(*compiled_for)).items():
        registers, spilled, instructions, in_fp64 = result
        print(f"| {name} | {registers} | {spilled} | {instructions:.0f} | {in_fp64} |")


if __name__ == "__main__":
    main()
