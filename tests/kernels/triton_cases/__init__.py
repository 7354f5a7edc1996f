"""The Triton kernels themselves against float64: a file an operator.

Run twice: under Triton's interpreter on the CPU by the files in triton_interpreter/, and compiled
on a GPU by test_triton.py.  In float32, and attention, whose code differs, in float16 too; not in
bfloat16, to which the interpreter does not round as a GPU does.
"""

from pathlib import Path

NAMES = sorted(
    {path.stem for path in Path(__file__).parent.glob("*.py")} - {"__init__", "conftest"}
)
