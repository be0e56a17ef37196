"""Layers point one way: reads the includes of vmm/ and the imports of python/ and says who strays.

The order is the one of CONTRIBUTING.md. The last tests break it on purpose, in a tree of their own.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Folder of vmm/ -> the folders whose headers it may include besides its own.
LAYERS = {
    "core": set(),
    "pool": {"core"},
    "backend": {"core"},
    "span": {"core", "pool", "backend"},
    "cache": {"core", "pool", "backend", "span"},
    "tier": {"core", "pool", "backend"},
    "bindings": {"core", "pool", "backend", "span", "cache", "tier"},
}
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)
PYTHON_OR_TORCH = re.compile(r"^(Python\.h|pybind11/|torch/|ATen/|c10/)")
CUDA = re.compile(r"^(cuda|cuda_runtime|cuda_runtime_api|driver_types)\.h$")

# What stands on the public API like any user's program; the rest of the package is below it.
APPLICATIONS = {
    *("demo", "cli", "doctor", "_machine", "_gpu", "_gpu_trial", "__main__"),
    "transformers",
}
# The modules that wrap the extension; all others use what these make of it.
NATIVE_USERS = {"batch", "cache", "frame_pool", "pool", "sequence"}


def cpp_violations(root: Path) -> Iterator[str]:
    for path in sorted(p for p in (root / "vmm").rglob("*") if p.suffix in (".cpp", ".hpp")):
        name = path.relative_to(root / "vmm")
        layer = name.parts[0]
        if layer not in LAYERS:
            yield f"{name}: the folder {layer} is no layer"
            continue
        for quoted, angled in INCLUDE.findall(path.read_text(encoding="utf-8")):
            target = quoted.split("/")[0]
            if quoted and target not in LAYERS:
                yield f'{name} includes "{quoted}": not written as "layer/file.hpp"'
            elif quoted and target != layer and target not in LAYERS[layer]:
                yield f'{name} includes "{quoted}": {layer} may not see {target}'
            header = quoted or angled
            if PYTHON_OR_TORCH.match(header) and layer != "bindings":
                yield f"{name} includes <{header}>: outside bindings/"
            if CUDA.match(header) and not (layer == "backend" and name.name.startswith("cuda_")):
                yield f"{name} includes <{header}>: outside backend/cuda_*"
            if angled and layer == "core" and ("." in angled or "/" in angled):
                yield f"{name} includes <{angled}>: core uses the standard library only"


def python_violations(root: Path) -> Iterator[str]:
    package = root / "python" / "kvspan"
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package)
        part = name.parts[0].removesuffix(".py")
        for module, line in kvspan_imports(path, package):
            where = f"{name}:{line} imports kvspan{'.' if module else ''}{module}"
            target = module.partition(".")[0]
            if target == "_native" and part not in NATIVE_USERS:
                yield f"{where}: only {', '.join(sorted(NATIVE_USERS))} may"
            elif part in APPLICATIONS and target and target not in APPLICATIONS:
                yield f"{where}: {part} uses the public API only"
            elif part not in APPLICATIONS and target in APPLICATIONS:
                yield f"{where}: an application, from the library"
    for path in sorted((root / "flash_compat").rglob("*.py")):
        for module, line in kvspan_imports(path, package):
            if module:
                where = f"{path.relative_to(root)}:{line} imports kvspan.{module}"
                yield f"{where}: flash_compat uses the public API only"


def kvspan_imports(path: Path, package: Path) -> Iterator[tuple[str, int]]:
    """Modules and private names below `kvspan` that a file imports, "" for a public name of it."""
    inside = path.is_relative_to(package)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.level == 0 or inside):
            base = (node.module or "").split(".") if node.module else []
            if node.level:
                parents = path.relative_to(package.parent).parent.parts
                base = [*parents[: len(parents) - node.level + 1], *base]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top != "kvspan":
                continue
            # `from kvspan import Pool` names a thing, `from kvspan import pool` a module.
            first = rest.partition(".")[0]
            is_module = (package / first).is_dir() or (package / f"{first}.py").exists()
            is_dunder = first.startswith("__")
            private = first.startswith("_") and not is_dunder
            yield (rest if first and (is_module or private) and not is_dunder else ""), node.lineno


def test_cpp_layers_point_one_way() -> None:
    assert list((ROOT / "vmm").rglob("*.hpp")), "no header was read"
    assert list(cpp_violations(ROOT)) == []


def test_python_layers_point_one_way() -> None:
    assert list((ROOT / "python" / "kvspan").glob("*.py")), "no module was read"
    assert list(python_violations(ROOT)) == []


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("core/a.hpp", '#include "pool/frame_pool.hpp"', "core may not see pool"),
        ("pool/a.hpp", '#include "backend/backend.hpp"', "pool may not see backend"),
        ("backend/a.cpp", '  #  include "span/span.hpp"', "backend may not see span"),
        ("span/a.hpp", '#include "cache/cache.hpp"', "span may not see cache"),
        ("cache/a.hpp", '#include "bindings/module.hpp"', "cache may not see bindings"),
        ("cache/a.hpp", "#include <torch/extension.h>", "outside bindings/"),
        ("span/a.hpp", "#include <pybind11/pybind11.h>", "outside bindings/"),
        ("backend/cuda_driver.hpp", "#include <Python.h>", "outside bindings/"),
        ("backend/host_files.cpp", "#include <cuda.h>", "outside backend/cuda_*"),
        ("core/a.cpp", "#include <sys/mman.h>", "standard library only"),
        ("cache/a.cpp", '#include "layout.hpp"', "not written as"),
        ("util/a.hpp", "#include <vector>", "no layer"),
    ],
)
def test_a_stray_include_is_caught(tmp_path: Path, name: str, line: str, message: str) -> None:
    write(tmp_path, f"vmm/{name}", f"// A file.\n{line}\n")
    (violation,) = cpp_violations(tmp_path)
    assert message in violation


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("python/kvspan/stats.py", "from kvspan import _native", "only batch"),
        ("python/kvspan/stats.py", "from . import _native", "only batch"),
        ("python/kvspan/stats.py", "import kvspan._native as n", "only batch"),
        ("python/kvspan/demo/engine.py", "from kvspan.pool import x", "public API only"),
        ("python/kvspan/demo/engine.py", "from ..pool import x", "public API only"),
        ("python/kvspan/demo/engine.py", "from kvspan import pool", "public API only"),
        ("python/kvspan/demo/engine.py", "from .. import _native", "only batch"),
        ("python/kvspan/cli.py", "import kvspan.pool", "public API only"),
        ("python/kvspan/doctor.py", "from kvspan import _secret", "public API only"),
        ("python/kvspan/pool.py", "from kvspan.demo.model import x", "from the library"),
        ("flash_compat/api.py", "from kvspan._native import x", "public API only"),
        ("flash_compat/api.py", "from kvspan import pool", "public API only"),
    ],
)
def test_a_stray_import_is_caught(tmp_path: Path, name: str, line: str, message: str) -> None:
    write(tmp_path, "python/kvspan/pool.py", "")
    write(tmp_path, "python/kvspan/demo/__init__.py", "")
    write(tmp_path, name, f"def later():\n    {line}\n")
    (violation,) = python_violations(tmp_path)
    assert message in violation


def test_what_is_allowed_passes(tmp_path: Path) -> None:
    write(tmp_path, "vmm/core/ids.hpp", "#include <cstdint>\n")
    write(tmp_path, "vmm/cache/cache.cpp", '#include "span/span.hpp"\n#include "cache/cache.hpp"\n')
    write(tmp_path, "vmm/backend/cuda_driver.cpp", "#include <cuda.h>\n")
    write(tmp_path, "vmm/bindings/module.cpp", "#include <pybind11/pybind11.h>\n")
    write(tmp_path, "python/kvspan/__init__.py", "from kvspan.pool import Pool, __doc__\n")
    write(tmp_path, "python/kvspan/pool.py", "from kvspan import _native\nimport torch\n")
    write(tmp_path, "python/kvspan/demo/engine.py", "import kvspan\nfrom kvspan import Pool\n")
    write(tmp_path, "python/kvspan/demo/main.py", "from .engine import x\nfrom . import engine\n")
    write(tmp_path, "python/kvspan/cli.py", "from kvspan import doctor, __version__\n")
    write(tmp_path, "flash_compat/api.py", "from kvspan import KVCache\nfrom . import x\n")
    assert [*cpp_violations(tmp_path), *python_violations(tmp_path)] == []
