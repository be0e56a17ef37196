"""`kvspan doctor` and the command line around it."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import kvspan
from kvspan import _gpu, _machine, cli, doctor


def kvspan_command(*words: str) -> "subprocess.CompletedProcess[str]":
    command = Path(sys.executable).with_name("kvspan")
    return subprocess.run([command, *words], capture_output=True, text=True, timeout=300)


def test_the_installed_command_works() -> None:
    done = kvspan_command("doctor")
    assert done.returncode == 0, done.stderr
    assert "host backend     works" in done.stdout
    assert f"kvspan {kvspan.__version__}" in done.stdout


def test_doctor_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["host"]["works"]
    assert report["host"]["page_sizes"] == [64 << 10, 2 << 20, 64 << 20]
    host = report["host"]
    assert host["huge_bytes"] == host["tried_bytes"] or host["huge_refusal"]
    assert report["limits"]["memory_total"] >= report["limits"]["memory_available"] > 0
    assert report["gpu"]["usable"] or report["gpu"]["why_not"]
    assert report["versions"]["kvspan"] == kvspan.__version__


def test_a_host_that_does_not_work_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(**_: object) -> None:
        raise kvspan.OutOfMemory("no memory at all")

    monkeypatch.setattr(kvspan, "Pool", refuse)
    assert cli.main(["doctor"]) == 1
    assert "DOES NOT WORK: no memory at all" in capsys.readouterr().out


def test_bytes_that_do_not_come_back_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.torch, "equal", lambda *_: False)
    host = doctor.try_host()
    assert not host.works
    assert "not those that were written" in host.error


def test_a_limit_on_address_space_is_shown_and_advised() -> None:
    script = "import kvspan.cli, sys; sys.exit(kvspan.cli.main(['doctor']))"
    limited = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 38, 1 << 38));"
    done = subprocess.run(
        [sys.executable, "-c", limited + script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "RLIMIT_AS         256 GiB" in done.stdout
    assert "ulimit -v unlimited" in done.stdout


def test_small_pages_and_few_mappings_are_advised() -> None:
    report = doctor.examine()
    host = dataclasses.replace(report.host, huge_bytes=0, huge_refusal="no")
    limits = dataclasses.replace(report.limits, max_map_count=1000)
    advice = " ".join(doctor._advice(host, limits))
    assert "4 KiB entries" in advice
    assert "sysctl -w vm.max_map_count" in advice


def test_a_machine_without_a_driver_says_which_library_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_gpu.ctypes, "CDLL", missing)
    gpu = doctor.try_cuda()
    assert not gpu.usable
    assert gpu.why_not == "libcuda.so.1 was not found: no NVIDIA driver"


def test_a_gpu_that_is_not_there_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(_gpu.ctypes, "CDLL", missing)
    assert cli.main(["doctor", "--gpu"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  driver            libcuda.so.1 was not found: no NVIDIA driver" in text
    assert text.endswith("0 passed, 1 failed\n")
    assert cli.main(["doctor", "--gpu", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["checks"][0]["outcome"] == "FAIL"


class FakeDriver:
    """A CUDA driver as ctypes shows it: `status` is cuInit's, then there are `n_devices`."""

    def __init__(self, status: int = 0, n_devices: int = 0) -> None:
        self.status, self.n_devices = status, n_devices

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.status

    def cuGetErrorName(self, status: int, name: object) -> int:  # noqa: N802
        name._obj.value = b"CUDA_ERROR_NO_DEVICE"
        return 0

    def cuDriverGetVersion(self, number: object) -> int:  # noqa: N802
        number._obj.value = 13010
        return 0

    def cuDeviceGetCount(self, number: object) -> int:  # noqa: N802
        number._obj.value = self.n_devices
        return 0

    def cuDeviceGet(self, device: object, ordinal: int) -> int:  # noqa: N802
        return 0

    def cuDeviceGetName(self, name: object, length: int, device: object) -> int:  # noqa: N802
        name.value = b"NVIDIA H100"
        return 0

    def cuDeviceGetAttribute(self, number: object, which: int, device: object) -> int:  # noqa: N802
        number._obj.value = {75: 9, 76: 0, 102: 1}[which]
        return 0


@pytest.mark.parametrize(
    ("driver", "torch_cuda", "why_not"),
    [
        (FakeDriver(status=100), "13.0", "cuInit failed with CUDA_ERROR_NO_DEVICE"),
        (FakeDriver(n_devices=0), "13.0", "the driver shows no device"),
        (FakeDriver(n_devices=1), "", "was built without CUDA"),
    ],
)
def test_each_step_towards_a_gpu_is_named(
    driver: FakeDriver, torch_cuda: str, why_not: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gpu.ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(_gpu.torch.version, "cuda", torch_cuda)
    gpu = _gpu.look_for_gpu()
    assert not gpu.usable
    assert why_not in gpu.why_not


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu.ctypes, "CDLL", lambda _: FakeDriver(n_devices=1))
    monkeypatch.setattr(_gpu.torch.version, "cuda", "13.0")
    gpu = _gpu.look_for_gpu()
    assert gpu.usable
    assert (gpu.driver, gpu.devices) == ("13.1", ("NVIDIA H100 (sm_90)",))


def test_cgroup_limits_are_read_up_to_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/proc/self/cgroup": "0::/user/job",
        "/sys/fs/cgroup/user/job/memory.max": "max",
        "/sys/fs/cgroup/user/memory.max": "1073741824",
    }
    monkeypatch.setattr(_machine, "_read", lambda path: files.get(str(path), ""))
    assert _machine._cgroup_limit() == 1 << 30
    files["/sys/fs/cgroup/user/job/memory.max"] = "4096"
    assert _machine._cgroup_limit() == 4096
    files["/proc/self/cgroup"] = "5:cpu,memory:/job"
    files["/sys/fs/cgroup/memory/job/memory.limit_in_bytes"] = "9223372036854771712"
    assert _machine._cgroup_limit() is None


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "COMMAND"), (["cure"], "invalid choice: 'cure'"), (["doctor", "--xml"], "--xml")],
)
def test_wrong_command_lines(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert message in capsys.readouterr().err


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert "demo" in text
    assert "doctor" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"kvspan {kvspan.__version__}\n"


def test_demo_gets_the_words_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("kvspan.demo.main")
    seen: list[list[str]] = []
    monkeypatch.setattr(module, "main", lambda words: seen.append(words) or 3)
    assert cli.main(["demo", "--random-weights", "--help"]) == 3
    assert seen == [["--random-weights", "--help"]]


def test_an_error_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kvspan.CapacityError("vm.max_map_count is used up")

    monkeypatch.setattr(doctor, "examine", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "kvspan doctor: vm.max_map_count is used up\n"


def test_ctrl_c_is_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_closed_pipe_is_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [Path(sys.executable).with_name("kvspan"), "doctor"]
    done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, text=True, timeout=300)
    os.close(write_end)
    assert done.returncode == 1
    assert done.stderr == ""
