"""Whether the CUDA driver shows a device, and what is missing where it does not.

The driver is asked directly, by ctypes: torch only says that CUDA is not available.
"""

from __future__ import annotations

import ctypes
import dataclasses

import torch

# CUdevice_attribute, from cuda.h.
CU_COMPUTE_CAPABILITY_MAJOR = 75
CU_COMPUTE_CAPABILITY_MINOR = 76
CU_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED = 102


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Whether a CUDA device can be used.

    Attributes
    ----------
    usable : bool
        Whether there is a device, and torch can use it.
    why_not : str
        What is missing; empty if usable.
    driver : str
        CUDA version of the driver, empty without one.
    devices : tuple of str
        Names of the devices that the driver shows.
    torch_cuda : str
        CUDA version that torch was built with, empty for a build without.
    """

    usable: bool
    why_not: str = ""
    driver: str = ""
    devices: tuple[str, ...] = ()
    torch_cuda: str = ""


def look_for_gpu() -> Gpu:
    """Ask the CUDA driver for devices.

    Returns
    -------
    Gpu
        What was found, or which step failed.
    """
    torch_cuda = torch.version.cuda or ""

    def without(reason: str) -> Gpu:
        return Gpu(False, reason, torch_cuda=torch_cuda)

    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return without("libcuda.so.1 was not found: no NVIDIA driver")
    status = driver.cuInit(0)
    if status != 0:
        return without(f"cuInit failed with {_cuda_error(driver, status)}")

    number = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(number))
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    driver.cuDeviceGetCount(ctypes.byref(number))
    devices = tuple(_cuda_device(driver, i) for i in range(number.value))
    why_not = ""
    if not devices:
        why_not = "the driver shows no device"
    elif not torch_cuda:
        why_not = f"torch {torch.__version__} was built without CUDA"
    return Gpu(not why_not, why_not, version, devices, torch_cuda)


def _cuda_error(driver: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    driver.cuGetErrorName(status, ctypes.byref(name))
    return name.value.decode() if name.value else f"error {status}"


def _cuda_device(driver: ctypes.CDLL, ordinal: int) -> str:
    device, number = ctypes.c_int(), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), ordinal) != 0:
        return f"device {ordinal} (not accessible)"
    name = ctypes.create_string_buffer(128)
    driver.cuDeviceGetName(name, len(name), device)

    def attribute(which: int) -> int:
        driver.cuDeviceGetAttribute(ctypes.byref(number), which, device)
        return number.value

    capability = (
        f"sm_{attribute(CU_COMPUTE_CAPABILITY_MAJOR)}{attribute(CU_COMPUTE_CAPABILITY_MINOR)}"
    )
    supported = attribute(CU_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED)
    virtual_memory = "" if supported else ", without virtual memory management"
    return f"{name.value.decode()} ({capability}{virtual_memory})"
