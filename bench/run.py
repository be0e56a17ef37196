"""The one door to the benchmarks: `python bench/run.py NAME [--json FILE]`, or `--list`.

Exit status: 0, or 1 when the benchmark failed or a bound that it checks does not hold, or 2 when
the command line is wrong.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from harness import BenchError, Result, common_arguments, document, table, write_json

FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Benchmark:
    """A file bench_*.py: what it is called and what it asks."""

    name: str
    question: str
    path: Path

    def load(self) -> ModuleType:
        spec = importlib.util.spec_from_file_location(self.path.stem, self.path)
        if spec is None or spec.loader is None:
            raise BenchError(f"{self.path} cannot be imported")
        module = importlib.util.module_from_spec(spec)
        sys.modules[self.path.stem] = module
        spec.loader.exec_module(module)
        return module


def discover(folder: Path = FOLDER) -> dict[str, Benchmark]:
    """Find the benchmarks of a folder by reading, not importing, its files."""
    found: dict[str, Benchmark] = {}
    for path in sorted(folder.glob("bench_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
        question = (ast.get_docstring(tree) or "").partition("\n")[0].strip()
        name = next((_name(node) for node in tree.body if _name(node)), None)
        if not question:
            raise BenchError(f"{path.name}: the docstring must open with the question it answers")
        if name is None:
            raise BenchError(f'{path.name}: NAME = "..." is missing')
        if name in found:
            raise BenchError(f"{path.name} and {found[name].path.name} are both called {name!r}")
        found[name] = Benchmark(name, question, path)
    return found


def _name(node: ast.stmt) -> str | None:
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Constant):
        return None
    is_name = any(isinstance(target, ast.Name) and target.id == "NAME" for target in node.targets)
    return node.value.value if is_name and isinstance(node.value.value, str) else None


def main(argv: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="bench/run.py",
        description="Run a benchmark; after its NAME, --help lists its own options.",
    )
    parser.add_argument("--list", action="store_true", help="what there is, and what each answers")
    parser.add_argument("name", nargs="?", metavar="NAME", help="the benchmark to run")
    # What stands behind the name is the benchmark's.
    split = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    args = parser.parse_args(words[: split + 1])
    try:
        benchmarks = discover(folder)
        if args.list or args.name is None:
            for benchmark in benchmarks.values():
                print(f"{benchmark.name:16} {benchmark.question}")
            if args.list:
                return 0
            parser.error("NAME is missing")
        if args.name not in benchmarks:
            parser.error(
                f"no benchmark {args.name!r}; there are: {', '.join(benchmarks) or 'none'}"
            )
        return run(benchmarks[args.name], words[split + 1 :])
    except BenchError as error:
        print(f"bench/run.py: {error}", file=sys.stderr)
        return 1


def run(benchmark: Benchmark, words: Sequence[str]) -> int:
    """Run one benchmark with its command line; print its table and write its JSON."""
    module = benchmark.load()
    parser = argparse.ArgumentParser(
        prog=f"bench/run.py {benchmark.name}", description=benchmark.question
    )
    common_arguments(parser)
    if hasattr(module, "add_arguments"):
        module.add_arguments(parser)
    args = parser.parse_args(words)
    if args.json is not None and not args.json.resolve().parent.is_dir():
        parser.error(f"--json: no folder {args.json.resolve().parent}")
    load_before = os.getloadavg()[0]
    result = module.run(args)
    if not isinstance(result, Result):
        raise BenchError(f"run() of {benchmark.path.name} gave no Result")
    doc = document(benchmark.name, benchmark.question, result, load_before)
    print(table(doc))
    if args.json is not None:
        write_json(args.json, doc)
        print(f"\nwrote {args.json}")
    return 0 if all(e.holds for e in result.expectations) else 1


if __name__ == "__main__":
    sys.exit(main())
