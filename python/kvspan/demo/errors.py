"""How the demo says that it cannot go on."""

from __future__ import annotations

import importlib.util


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


def require(module: str, purpose: str) -> None:
    """Raise `DemoError` with the install command if `module` is missing.

    Parameters
    ----------
    module : str
        A top-level module of the ``demo`` extra.
    purpose : str
        What it is needed for, as in "to draw the picture".
    """
    if importlib.util.find_spec(module) is None:
        raise DemoError(
            f"the demo needs the package {module!r} {purpose}: pip install 'kvspan[demo]'"
        )
