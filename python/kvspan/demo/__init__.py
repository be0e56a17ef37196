"""``kvspan demo``: a real model and real requests over kvspan and two baselines.

Two acts: questions with a shared system prompt, answered together (`kvspan.demo.chat`), and
requests of a public trace over three KV stores with identical tokens (`kvspan.demo.trace`). The
packages that it needs beyond kvspan's own come with ``pip install 'kvspan[demo]'``.
"""

from __future__ import annotations

from .main import main

__all__ = ["main"]
