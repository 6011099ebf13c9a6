"""Many random calls of the native kernels, on every instruction set that this processor has.

    uv run python tests/ops/native_fuzz_all.py --calls 50000

Builds tests/ops/native_fuzz.cpp against the kernels that Python loads, lets it run on one instruction set after the other, and
prints a line for each: calls, mismatches, seed and seconds, or that this processor lacks it. A mismatch is printed with what
brings it back. Exits with 1 if there was one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ufbert.ops.native import build, compiler

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=50_000, help="of each instruction set")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--program", type=Path, help="the built native_fuzz, if there is one")
    given = parser.parse_args()
    try:
        kernels, command = build.load(), build.compiler()
    except build.CannotBuild as error:
        print(f"There are no native kernels: {error}.", file=sys.stderr)
        return 2
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        program = given.program or Path(scratch) / "native_fuzz"
        if not given.program:
            source, library = str(HERE / "native_fuzz.cpp"), str(build.library())
            headers = f"-I{compiler.SOURCES}"
            link = [command, "-std=c++17", "-O2", headers, source, library, "-pthread", "-o", str(program)]
            subprocess.run(link, check=True)
        for name in compiler.INSTRUCTION_SETS:
            os.environ["UFBERT_ISA"] = name
            if not kernels.ufbert_isa():
                print(f"{name}: this processor lacks it", flush=True)
                continue
            start = time.perf_counter()
            options = ["--calls", str(given.calls), "--seed", str(given.seed)]
            done = subprocess.run([program, *options], capture_output=True, text=True)
            said = (done.stdout or done.stderr or f"ended with status {done.returncode}").strip().splitlines()
            print(f"{name}: {said[-1]}, {time.perf_counter() - start:.0f} s", flush=True)
            if done.returncode:
                print("\n".join(said[:-1]), flush=True)
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
