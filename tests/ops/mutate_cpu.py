"""Break the processor's kernels, one line at a time, and see whether their tests notice: run this file (some minutes).

Each mutant is compiled into a copy of the library, and the tests run on it until one fails.
`python tests/ops/mutate_cpu.py [words]` tries those whose file or new line has one of the words.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from minillm.ops.build_plan import BINDING, CPU, SOURCES, TORCH, make_plan
from minillm.ops.compilers import find_cxx

HERE = Path(__file__).parent
FLAGS = ("-O1",)


class Mutant(NamedTuple):
    unit: str  # to compile
    file: str  # where the line stands
    line: str
    instead: str
    tests: str


def of(unit: str, tests: str, *changes: tuple[str, str], file: str = "") -> list[Mutant]:
    return [Mutant(f"{unit}.cpp", file or f"{unit}.cpp", *change, f"test_native_{tests}.py") for change in changes]


MUTANTS = [
    *of(
        *("rope", "rope"),
        ("i + LANES <= half", "i < half"),
        ("left * load(cos + i) + right", "left * load(cos + i) - right"),
        ("load(cos + half + i)", "load(cos + i)"),
        ("b * call.table_batch", "0 * call.table_batch"),
    ),
    *of(
        *("attention_forward", "attention"),
        ("load(total + i) * shrink + added", "load(total + i) + added"),
        ("load(output + k * columns + i) * shrink", "load(output + k * columns + i)"),
        ("total[i] > 0 ? 1 / total[i] : 0", "1 / total[i]"),
        (" : -INFINITY", " : 0"),
        ("block.hide(scores, begin, end);", ""),
    ),
    *of(
        *("attention_forward", "attention"),
        ("begin > newest[count - 1]", "begin > newest[0]"),
        ("begin >= call.prefix && end - 1 <=", "end - 1 <="),
        ("end - 1 > newest[0]", "end - 1 > newest[count - 1]"),
        ("newest_of < key", "newest_of <= key"),
        ("newest_of - call.window >= key", "newest_of - call.window > key"),
        ("key >= call.prefix", "key > call.prefix"),
        ("hidden = IntVec{} - int(padding)", "hidden = IntVec{}"),
        ("i < count ? factor * to_float(from[k]) : 0.0f", "i < count ? to_float(from[k]) : 0.0f"),
        file="attention_block.h",
    ),
    *of(
        *("attention_backward", "attention"),
        ("std::isinf(sum) ? -LOWEST : sum * LOG2_E", "sum * LOG2_E"),
        ("delta[i] = dot;", "delta[i] = 0;"),
        ("- delta) * scale", "- delta)"),
        ("block.hide(scores, begin, end);", ""),
    ),
    *of(
        *("attention_decode", "attention"),
        ("std::min(j, n - 1) * row", "j * row"),
        ("if (k < K) multiply(", "if (k + 1 < K) multiply("),
        ("end - 1 > block.newest[i]", "end > block.newest[i] + 2"),
        ("(key >= call.prefix) & ", ""),
        ("share * partials[p].total[i]", "partials[p].total[i]"),
        ("total += share", "total = share"),
        ("std::fill(scores + end - begin, scores + round_up(end - begin), HIDDEN);", ""),
    ),
    *of(
        *("linear", "linear"),
        ("std::min(r + i, call.R - 1)", "r + i"),
        ("call.scale * sums", "sums"),
        ("begin + length * RUNS, count - length * RUNS", "begin + length * RUNS, 0"),
        ("(bias ? to_float(bias[at]) : 0.0f)", "0.0f"),
        ("u.rows, call.R)", "u.rows, call.R - 1)"),
    ),
    *of(
        *("lora_gather", "lora"),
        ("n < 0 ? 0 : rank(call, n)", "n < 0 ? 0 : call.R"),
        ("if (adapter(call, b) != n) continue;", ""),
        ("scale(call, n) * sums", "sums"),
        ("std::fill_n(u, int64_t(count) * call.R, 0.0f);", ""),
        ("for (int t = 0; t < count; ++t) std::copy_n", "for (int t = 0; t + 1 < count; ++t) std::copy_n"),
    ),
    *of(
        *("lora_linear", "lora_linear"),
        ("row_key(dropout, row)", "row_key(dropout, row + 1)"),
        ("16777216.0f)", "16777215.0f)"),
        ("keeping(dropout, scale, key, first + k), count - k)", "keeping(dropout, scale, key, k), count - k)"),
        ("const Vec before = base ?", "const Vec before = !base ?"),
        ("call.scale * sums[r * whole + k]", "sums[r * whole + k]"),
    ),
    *of(
        *("lora_linear", "lora_linear"),
        ("scale * u[(t + i) * u_row + r]", "u[(t + i) * u_row + r]"),
        ("std::min(LANES, width - i)", "LANES"),
        ("std::min(r + i, R - 1)", "r + i"),
        file="thin.h",
    ),
    *of(
        *("nf4_linear", "nf4"),
        ("call.weight.block % 8 == 0", "true"),
        ("CHUNK % call.weight.block == 0", "true"),
        ("to[(i ^ 1) * LANES", "to[i * LANES"),
        ("int(start & (w.block - 1))", "0"),
        ("begin + length * RUNS, count - length * RUNS", "begin + length * RUNS, 0"),
        ("if (k < call.Din)", "if (k < call.Din - 8)"),
        ("numbers.data(), TILE_DEPTH, 1", "numbers.data(), depth, 1"),
    ),
    *of(
        *("nf4", "nf4"),
        ("absmax > 0 ? absmax : 1.0f", "absmax"),
        ("value > midpoints", "value >= midpoints"),
        ("& 0x7fffffff", "& 0x7f7fffff"),
        ("i < n; i += LANES", "i + LANES <= n; i += LANES"),
    ),
    *of(
        *("nf4", "nf4"),
        ("rest = w.block - first % w.block", "rest = w.block"),
        ("out[i] += *w.offset", "out[i] += 0"),
        ("(first + i) / 256 + 1) * 256 - first", "count"),
        ("4 * (i % 8 ^ 1)", "4 * (i % 8)"),
        file="nf4_codes.h",
    ),
]


def compile_unit(csrc: Path, unit: str, to: Path) -> None:
    flags = (*BINDING, "-isystem", str(TORCH / "include")) if unit == "binding.cpp" else CPU
    subprocess.run([*find_cxx().command, *flags, *FLAGS, "-w", "-c", unit, "-o", str(to)], cwd=csrc, check=True)


def link(objects: list[Path], to: Path) -> None:
    flags = ("-shared", "-pthread", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10")
    subprocess.run([*find_cxx().command, *map(str, objects), *flags, "-o", str(to)], check=True)


def is_killed(cache: Path, tests: str) -> bool:
    """Whether a test fails with the library in this cache."""
    command = ["-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "not accepts and not compile and not thread"]
    environment = {**os.environ, "MINILLM_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command, str(HERE / tests)], env=environment, capture_output=True)
    if done.returncode not in (0, 1, -6, -8, -11):  # passed, failed, or it crashed
        raise RuntimeError(done.stdout.decode() + done.stderr.decode())
    return done.returncode != 0


def main(words: list[str]) -> None:
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.instead}" for word in words)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        csrc = Path(shutil.copytree(SOURCES, folder / "csrc"))
        library = folder / "cache" / make_plan("cpu").name / "lib.so"
        library.parent.mkdir(parents=True)
        objects = {unit: folder / f"{Path(unit).stem}.o" for unit in make_plan("cpu").units}
        for unit, made in objects.items():
            compile_unit(csrc, unit, made)
        survivors = 0
        for mutant in chosen:
            path = csrc / "cpu" / mutant.file
            whole = path.read_text()
            if mutant.line not in whole:
                raise SystemExit(f"{mutant.file} has no longer: {mutant.line}")
            path.write_text(whole.replace(mutant.line, mutant.instead, 1))
            compile_unit(csrc, f"cpu/{mutant.unit}", folder / "mutant.o")
            path.write_text(whole)
            others = [made for unit, made in objects.items() if unit != f"cpu/{mutant.unit}"]
            link([*others, folder / "mutant.o"], library)
            killed = is_killed(folder / "cache", mutant.tests)
            survivors += not killed
            fate = "killed  " if killed else "SURVIVED"
            print(f"{fate} {mutant.file}: {mutant.line}  ->  {mutant.instead}", flush=True)
        print(f"{len(chosen)} mutants, {survivors} survivors")


if __name__ == "__main__":
    main(sys.argv[1:])
