"""The examples run as they stand there, at smaller sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

CHAT = Path(__file__).resolve().parents[2] / "examples" / "chat.py"


def test_chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("chat", CHAT)
    assert spec is not None
    assert spec.loader is not None
    chat = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(chat)
    for name, value in {"TURNS": 3, "SAID": 280, "ANSWERED": 4, "N_BEST": 3}.items():
        monkeypatch.setattr(chat, name, value)
    monkeypatch.setattr(sys, "argv", ["chat.py"])
    chat.main()
    printed = capsys.readouterr().out
    assert "turn 1: a prompt of 280 tokens, 0 known, 280 computed" in printed
    assert "turn 2: a prompt of 564 tokens, 256 known, 308 computed" in printed
    assert "turn 3: a prompt of 848 tokens, 512 known" in printed
    assert "3 answers of 4 tokens to a conversation of 852" in printed
