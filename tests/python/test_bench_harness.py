"""The benchmarks' own tools: timing in turn, statistics, discovery, the JSON record."""

import json
from pathlib import Path

import pytest

import cpp_programs
import harness
import run
from harness import BenchError, Expectation, Result, Series


def test_series_statistics() -> None:
    series = Series((5.0, 1.0, 4.0, 2.0, 3.0))
    assert series.median == 3.0
    assert series.quartiles() == (2.0, 4.0)
    assert series.as_dict() == {
        "unit": "s",
        "n": 5,
        "median": 3.0,
        "min": 1.0,
        "q1": 2.0,
        "q3": 4.0,
        "max": 5.0,
        "samples": [5.0, 1.0, 4.0, 2.0, 3.0],
    }
    assert Series((2.0,)).quartiles() == (2.0, 2.0)
    with pytest.raises(ValueError, match="at least one sample"):
        Series(())


def test_interleave_takes_turns_and_starts_with_another_each_round() -> None:
    order: list[str] = []
    cases = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = harness.interleave(cases, repeats=7)
    untimed, rounds = "abc", "abcbcacababcbcacababc"
    assert "".join(order) == untimed + rounds
    assert {name: len(series.samples) for name, series in times.items()} == dict.fromkeys("abc", 7)


def test_interleave_divides_by_the_calls_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 1000))  # every look at the clock is 1 us later
    monkeypatch.setattr(harness.time, "perf_counter_ns", lambda: next(clock))
    times = harness.interleave({"a": lambda: None}, repeats=7, calls=10)
    assert times["a"].samples == pytest.approx([1e-7] * 7)


def test_interleave_times_nothing_whose_results_differ() -> None:
    with pytest.raises(BenchError, match="'b' and 'a' give different results"):
        harness.interleave({"a": lambda: 1, "b": lambda: 2}, equal=lambda x, y: x == y)
    assert set(harness.interleave({"a": lambda: 1, "b": lambda: 2})) == {"a", "b"}


def test_interleave_refuses_too_few_repeats() -> None:
    with pytest.raises(ValueError, match="7 at least"):
        harness.interleave({"a": lambda: None}, repeats=6)
    with pytest.raises(ValueError, match="calls must be positive"):
        harness.interleave({"a": lambda: None}, calls=0)


def test_ratio_and_expectation() -> None:
    result = Result({"a": Series((2.0,)), "b": Series((3.0,))}, baseline="a")
    assert result.ratio("b") == 1.5
    with pytest.raises(ValueError, match="was not measured"):
        Result({"a": Series((2.0,))}, baseline="b")
    assert Expectation("step", 9.0, 10.0).holds
    assert not Expectation("step", 11.0, 10.0).holds
    assert Expectation("speed", 0.98, 0.97, at_least=True).holds
    assert "DOES NOT HOLD" in str(Expectation("speed", 0.96, 0.97, at_least=True))


def test_machine_says_where_it_ran() -> None:
    machine = harness.machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 0
    assert set(machine["transparent_hugepage"]) == {"enabled", "shmem_enabled", "defrag"}
    json.dumps(machine)
    assert harness.versions()["python"]


BENCHMARK = '''
"""How long is nothing?

More words.
"""
from harness import Expectation, Result, interleave

NAME = "nothing"


def add_arguments(parser):
    parser.add_argument("--limit", type=float, default=1.0)


def run(args):
    times = interleave({"none": lambda: None, "one": lambda: None}, args.repeats)
    bound = Expectation("none", times["none"].median, args.limit)
    return Result(times, "none", {"limit": args.limit}, [bound], ["A note."])
'''


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench_nothing.py").write_text(BENCHMARK)
    return tmp_path


def test_list_says_the_questions(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list"], folder) == 0
    assert capsys.readouterr().out.split(maxsplit=1) == ["nothing", "How long is nothing?\n"]


def test_run_prints_and_writes_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "result.json"
    assert run.main(["nothing", "--json", str(file), "--repeats", "8"], folder) == 0
    shown = capsys.readouterr().out
    assert "How long is nothing?" in shown
    assert "none (baseline)" in shown
    assert "A note." in shown
    doc = json.loads(file.read_text())
    assert doc["question"] == "How long is nothing?"
    assert {"machine", "versions", "command", "parameters", "load", "time"} <= set(doc)
    assert len(doc["measurements"]["one"]["samples"]) == 8
    assert doc["measurements"]["none"]["ratio"] == 1.0
    assert doc["expectations"][0]["holds"]


def test_columns_show_a_row_a_case() -> None:
    result = Result(
        {
            "small: time": Series((0.002,)),
            "small: calls: map": Series((3.0,), ""),
            "large: time": Series((1.0, 2.0, 3.0)),
            "large: not shown": Series((7.0,), ""),
        },
        columns={"s": "time", "maps": "calls: map"},
    )
    doc = harness.document("name", "question?", result, 0.0)
    assert harness.table(doc).splitlines()[-3:] == [
        "          s  maps",
        "small  2 ms     3",
        "large   2 s",
    ]
    assert doc["measurements"]["large: not shown"]["median"] == 7.0


def test_a_bound_that_does_not_hold_fails_the_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["nothing", "--limit", "0"], folder) == 1
    assert "DOES NOT HOLD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["other"], "no benchmark 'other'; there are: nothing"),
        ([], "NAME is missing"),
        (["nothing", "--json", "/nonexistent/x.json"], "no folder /nonexistent"),
        (["nothing", "--what"], "unrecognized arguments: --what"),
    ],
)
def test_wrong_command_lines(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        run.main(words, folder)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [('NAME = "x"\n', "must open with the question"), ('"""Why?"""\n', "is missing")],
)
def test_a_file_without_question_or_name_is_refused(
    text: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bench_other.py").write_text(text)
    assert run.main(["--list"], folder) == 1
    assert message in capsys.readouterr().err


def test_every_benchmark_in_the_tree_has_a_question() -> None:
    for benchmark in run.discover().values():
        assert benchmark.question.endswith("?"), benchmark.path


def test_lines_of_a_cpp_program() -> None:
    lines = ['{"page_size": 2097152}', "", '{"name": "map", "samples": [1e-6, 2e-6]}']
    result = cpp_programs.parse_lines(lines, "x")
    assert result.parameters == {"page_size": 2097152}
    assert result.measurements["map"] == Series((1e-6, 2e-6))
    with pytest.raises(BenchError, match="no JSON object: 'hello'"):
        cpp_programs.parse_lines(["hello"], "x")
    with pytest.raises(BenchError, match="no measurement"):
        cpp_programs.parse_lines(['{"a": 1}'], "x")


def test_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    harness.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
