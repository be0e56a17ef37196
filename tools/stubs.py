"""Writes the stub of the compiled module from the module itself: `make stubs`.

The stub is committed, so that type checkers and editors work without a build, and a test compares
it with what this script makes now.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

MODULE = "kvspan._native"
STUB = Path(__file__).resolve().parent.parent / "python" / "kvspan" / "_native.pyi"


class StubError(Exception):
    """The stub could not be made; the message says why."""


def generate() -> str:
    """Make the stub of the module that is installed now.

    Returns
    -------
    str
        The text of the .pyi file.

    Raises
    ------
    StubError
        When the module cannot be imported, or a signature in it cannot be written as Python: a
        C++ type that no binding has registered before its first use, say.
    """
    with tempfile.TemporaryDirectory() as folder:
        # A process of its own: the module may have been imported here before it was rebuilt.
        command = [sys.executable, "-m", "pybind11_stubgen", MODULE, "-o", folder, "--exit-code"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise StubError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}".rstrip())
        made = Path(folder, *MODULE.split("."))
        path = made / "__init__.pyi" if made.is_dir() else made.with_suffix(".pyi")
        return path.read_text(encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare only; exit 1 if it differs")
    args = parser.parse_args()
    try:
        text = generate()
    except StubError as error:
        print(error, file=sys.stderr)
        return 1
    if args.check:
        if not STUB.exists() or STUB.read_text(encoding="utf-8") != text:
            print(f"{STUB.name} is not what the module says: run `make stubs`", file=sys.stderr)
            return 1
        print(f"{STUB.name} is up to date")
        return 0
    STUB.write_text(text, encoding="utf-8")
    print(f"wrote {STUB}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
