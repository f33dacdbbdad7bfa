"""The GPU of this machine, as its driver describes it, asked through ctypes: no CUDA package is needed for that."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qncd_deploy.errors import BackendMissing

DRIVER = "libcuda.so.1"

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """name: such as "NVIDIA L4";  sm: its compute capability, such as "sm89";  memory: bytes;  cuda: the newest CUDA
    that the driver runs, such as "12.8".
    """

    name: str
    sm: str
    memory: int
    cuda: str


def find_device(load: Callable[[str], Any] = ctypes.CDLL) -> Device:
    """The first GPU that the driver shows (CUDA_VISIBLE_DEVICES chooses).

    Raises: BackendMissing if there is no driver or no GPU.
    """
    try:
        driver = load(DRIVER)
    except OSError as exc:
        raise BackendMissing(
            f"GPU: no NVIDIA driver on this machine ({DRIVER} was not found). Install it, or run where there is a GPU."
        ) from exc

    def call(name: str, *args: Any) -> None:
        if code := getattr(driver, name)(*args):
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            words = (text.value or b"").decode() or f"code {code}"
            raise BackendMissing(f"GPU: none that can be used on this machine ({name}: {words}). Check `nvidia-smi`.")

    call("cuInit", 0)
    handle, number = ctypes.c_int(), ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(handle), 0)
    name = ctypes.create_string_buffer(256)
    call("cuDeviceGetName", name, len(name), handle)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        call("cuDeviceGetAttribute", ctypes.byref(number), attribute, handle)
        capability.append(number.value)
    memory = ctypes.c_size_t()
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    call("cuDriverGetVersion", ctypes.byref(number))
    major, minor = divmod(number.value, 1000)
    return Device(
        name=name.value.decode(),
        sm="sm{}{}".format(*capability),
        memory=memory.value,
        cuda=f"{major}.{minor // 10}",
    )
