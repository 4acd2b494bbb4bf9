"""The native kernels without Python: every instruction set, other processors, memory, threads.

Compiles native/selftest.cpp together with the kernels, in several ways, and runs it. It prints the checksum
of all results of each function under each instruction set; they must be the same everywhere.
"""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parent / "native"
KERNELS = Path(__file__).parents[2] / "kernels" / "native"
FLAGS = ("-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-pthread")
"""As the library is built (setup.py); some of these decide what is computed."""
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
VECTORS = {
    "isa_avx2": ("-mavx2", "-mfma"),
    "isa_avx512": _AVX512,
    "isa_avx512_bf16": (*_AVX512, "-mavx512bf16"),
}
"""By source, where the target is x86-64."""
MEMORY = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
RACES = ("-fsanitize=thread", "-g1")  # a race ends the program with 66
FUNCTIONS = (
    "qc_linear_forward", "qc_lora_delta", "qc_cache_write", "qc_attention", "qc_rms_norm", "qc_rotary",
    "qc_gated", "qc_argmax", "qc_draw_tokens", "qc_layers_forward", "threads",
)  # fmt: skip
"""What the self-test prints about under every instruction set, besides child_process."""
MEDIUM = ("qc_likeliest", "qc_linear_forward/medium", "qc_layers_forward/medium")
"""And under those alone that have products of medium precision."""
TIMEOUT_S = 500

Checksums = dict[str, dict[str, str]]
"""By instruction set and function."""


def build(folder: Path, compiler: str, optimise: str, *flags: str) -> Path:
    """The self-test as a program in `folder`."""
    program = folder / "selftest"
    arguments = linked(folder, compiler, optimise, *flags, source=TESTS / "selftest.cpp")
    checked_run([compiler, *arguments, "-o", str(program)])
    return program


def linked(folder: Path, compiler: str, optimise: str, *flags: str, source: Path | None = None) -> list[str]:
    """Compiles the kernels, and another source, into `folder`; returns what to link them with."""
    target = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=True).stdout
    on_x86 = target.startswith("x86_64")

    def compiled(source: Path) -> Path:
        # Plain C++ is here for its bits, not its speed, and -O3 takes half a minute.
        level = ("-Og" if "-g1" in flags else "-O2") if source.stem == "isa_generic" else optimise
        vectors = VECTORS.get(source.stem, ()) if on_x86 else ()
        made = folder / f"{source.stem}.o"
        checked_run(
            [compiler, level, *FLAGS, *vectors, *flags, f"-I{KERNELS}", "-c", str(source), "-o", str(made)]
        )
        return made

    sources = [*sorted(KERNELS.glob("*.cpp")), *([source] if source else [])]
    with ThreadPoolExecutor(2) as pool:
        objects = [str(made) for made in pool.map(compiled, sources)]
    return [*FLAGS, *flags, *objects]


def checked_run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What the command printed; a test fails with its complaints."""
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, **(environment or {})}
    )
    if run.returncode != 0:
        pytest.fail(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}{run.stderr[-8000:]}")
    return run.stdout


def checksums(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Checksums:
    found: Checksums = {}
    for line in checked_run([*command, *FUNCTIONS], environment).splitlines():
        isa, function, checksum = line.split()
        found.setdefault(isa, {})[function] = checksum
    assert all(tuple(functions) == FUNCTIONS for functions in found.values())
    return found


def medium_checksums(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """What it prints about products of medium precision; skips the test where there are none."""
    found = checked_run([*command, *MEDIUM], environment)
    if not found:
        pytest.skip("this processor has no AVX512-BF16")
    return found


def needed(*programs: str) -> str:
    """The first of the programs that is here; skips the test if none is."""
    for program in programs:
        if shutil.which(program):
            return program
    pytest.skip(f"needs {' or '.join(programs)}")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The self-test for this processor, with everything optimised as in the library."""
    return str(build(tmp_path_factory.mktemp("native"), needed("g++"), "-O3"))


@pytest.fixture(scope="module")
def here(program: str) -> Checksums:
    """What this processor computes."""
    return checksums([program])


def test_instruction_sets_agree_to_the_bit(here: Checksums) -> None:
    assert set(here) >= {"generic"}
    assert all(functions == here["generic"] for functions in here.values())


def test_a_child_process_computes_the_same_bits(program: str) -> None:
    # Not under an emulator or ThreadSanitizer: neither can follow a fork of a process with threads.
    assert "child_process" in checked_run([program, "child_process"])


def test_no_memory_error_and_no_undefined_behaviour(tmp_path: Path, program: str, here: Checksums) -> None:
    checked = str(build(tmp_path, needed("g++"), "-O2", *MEMORY))
    # Memory that was never written reads as NaN.
    options = {"ASAN_OPTIONS": "max_malloc_fill_size=1073741824:malloc_fill_byte=255"}
    assert checksums([checked], options) == here
    assert medium_checksums([checked], options) == medium_checksums([program])


def test_hypothesis_finds_no_memory_error(tmp_path: Path) -> None:
    """The operations as Python calls them, against their references, over shapes that are made up anew."""
    compiler = needed("g++")
    library = tmp_path / "_native.abi3.so"
    checked_run(
        [compiler, *linked(tmp_path, compiler, "-O1", "-fPIC", *MEMORY), "-shared", "-o", str(library)]
    )
    runtime = checked_run([compiler, "-print-file-name=libasan.so"]).strip()
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    tests = str(Path(__file__).parent / "test_native.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        tests,
        f"--native-library={library}",
        "-p",
        "no:cacheprovider",
    ]
    assert " passed" in checked_run(command, options)


def test_no_two_threads_meet_in_memory(tmp_path: Path) -> None:
    program = str(build(tmp_path, needed("g++"), "-O1", *RACES))
    trial = subprocess.run([program, "none"], capture_output=True, text=True, timeout=TIMEOUT_S)
    if "unexpected memory mapping" in trial.stderr:
        pytest.skip("this kernel places memory where ThreadSanitizer cannot have it")
    assert "threads" in checked_run([program, "qc_lora_delta", "qc_layers_forward", *MEDIUM, "threads"])


def test_an_arm_processor_computes_the_same_bits(tmp_path: Path, here: Checksums) -> None:
    if platform.machine() == "aarch64":
        pytest.skip("this processor is one")
    emulator = needed("qemu-aarch64", "qemu-aarch64-static")
    program = build(tmp_path, needed("aarch64-linux-gnu-g++"), "-O2", "-static")
    there = checksums([emulator, str(program)])
    assert set(there) == {"generic", "neon"}
    assert all(functions == here["generic"] for functions in there.values())


def test_an_x86_processor_with_avx2_computes_the_same_bits(tmp_path: Path, here: Checksums) -> None:
    if "avx2" in here:
        pytest.skip("this processor is one")
    on_x86 = platform.machine() == "x86_64"
    emulator = needed("qemu-x86_64", "qemu-x86_64-static")
    compiler = needed("g++" if on_x86 else "x86_64-linux-gnu-g++")
    # The emulator's masked loads touch what they mask out.
    program = build(tmp_path, compiler, "-O2", "-static", "-DSELFTEST_WITHOUT_FENCES")
    there = checksums([emulator, "-cpu", "max", str(program)])
    assert set(there) == {"generic", "avx2"}
    assert all(functions == here["generic"] for functions in there.values())
