"""The command ``kvspan``: ``kvspan demo`` and ``kvspan doctor``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence

import kvspan


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        The words behind ``kvspan``; those of this process by default.

    Returns
    -------
    int
        The exit status: 0 if all went well, 1 for an error that was reported, 130 when interrupted.

    Raises
    ------
    SystemExit
        With status 2 when the command line is wrong, 0 after ``--help`` and ``--version``.
    """
    args, rest = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        status = _demo(rest) if args.command == "demo" else _doctor(args.gpu, as_json=args.json)
        sys.stdout.flush()
        return status
    except kvspan.Error as error:
        print(f"kvspan {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read the output has gone: nothing to say, and nowhere for the last flush to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="kvspan",
        description="KV caches that look contiguous and are paged underneath.",
    )
    parser.add_argument("--version", action="version", version=f"kvspan {kvspan.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # The demo has a parser of its own, --help included.
    commands.add_parser(
        "demo",
        add_help=False,
        help="decode real requests over kvspan, a block table and preallocation, side by side",
    )
    doctor = commands.add_parser(
        "doctor",
        help="what this machine offers: backends, page sizes, huge pages, limits, GPU or why not",
        description="Try the host backend and huge pages, look at limits, and say whether there is "
        "a GPU or why not. The exit status is 0 if the host backend works, otherwise 1.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument(
        "--gpu",
        nargs="?",
        type=int,
        const=0,
        metavar="N",
        help="check a GPU (cuda:N, the first by default) instead: the driver, each kind of call "
        "timed, kvspan, attention; the exit status is 1 if anything fails or there is none",
    )
    if words[:1] == ["demo"]:
        return parser.parse_args(["demo"]), words[1:]
    return parser.parse_args(words), []


def _demo(words: list[str]) -> int:
    from kvspan.demo.main import main as run_demo

    return run_demo(words)


def _doctor(gpu: int | None, as_json: bool) -> int:
    from kvspan import doctor

    if gpu is not None:
        trial = doctor.try_gpu(gpu)
        print(
            json.dumps(dataclasses.asdict(trial), indent=2)
            if as_json
            else f"{doctor.format_versions()}\n\n{doctor.format_trial(trial)}"
        )
        return 0 if trial.passed else 1
    report = doctor.examine()
    print(json.dumps(report.as_dict(), indent=2) if as_json else doctor.format_report(report))
    return 0 if report.host.works else 1


if __name__ == "__main__":
    sys.exit(main())
