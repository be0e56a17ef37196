"""Builds and runs the benchmarks that are C++ programs, and reads what they print."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness import BenchError, Result, Series
from machine import ROOT

BUILD = ROOT / "build" / "bench"


def cpp_benchmark(target: str, arguments: Sequence[str] = ()) -> Result:
    """Build a program of bench/cpp and run it.

    It prints JSON lines: one with `"samples"` is a measurement (`{"name": "map", "unit": "s",
    "samples": [...]}`), the members of any other are parameters. Anything else on its standard
    output is an error; what it says on standard error is shown.
    """
    build(target)
    program = [str(BUILD / "bin" / target), *arguments]
    ran = subprocess.run(program, stdout=subprocess.PIPE, text=True)
    if ran.returncode != 0:
        raise BenchError(f"{shlex.join(program)} ended with exit status {ran.returncode}")
    return parse_lines(ran.stdout.splitlines(), source=target)


def build(target: str) -> None:
    """Build a target of the CMake project, in a folder that all benchmarks share."""
    cmake = _tool("cmake")
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "--log-level=WARNING"]
    configure += ["-DKVSPAN_PYTHON=OFF", "-DKVSPAN_BENCH=ON"]
    # Which Python is asked for the CUDA header that came with it.
    configure += [f"-DPython_EXECUTABLE={sys.executable}"]
    boost = importlib.util.find_spec("boost_headers")
    if boost is not None and boost.origin is not None:
        configure += [f"-DBOOST_HEADERS={Path(boost.origin).parent / 'include'}"]
    configure += [f"-DCMAKE_RUNTIME_OUTPUT_DIRECTORY={BUILD / 'bin'}"]
    if not (BUILD / "CMakeCache.txt").exists() and shutil.which("ninja", path=_tool_path()):
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}"]
    for command in (configure, [cmake, "--build", str(BUILD), "--target", target]):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode != 0:
            raise BenchError(f"{shlex.join(command)} failed:\n{done.stdout.rstrip()}")


def parse_lines(lines: Iterable[str], source: str) -> Result:
    """Read the JSON lines that a C++ benchmark printed."""
    result = Result({})
    for line in lines:
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except json.JSONDecodeError:
            item = None
        if not isinstance(item, dict):
            raise BenchError(f"{source} printed a line that is no JSON object: {line!r}")
        if "samples" in item:
            samples = tuple(float(x) for x in item["samples"])
            result.measurements[item["name"]] = Series(samples, item.get("unit", "s"))
        else:
            result.parameters.update(item)
    if not result.measurements:
        raise BenchError(f"{source} printed no measurement")
    return result


def _tool_path() -> str:
    # Tools of the virtual environment first, whether or not it was activated.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _tool(name: str) -> str:
    path = shutil.which(name, path=_tool_path())
    if path is None:
        raise BenchError(f"{name} is needed to build the C++ benchmarks: pip install {name}")
    return path
