"""The machine line: what ran, on what, and what the GPU's sensors said meanwhile."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import threading
import time
from pathlib import Path
from statistics import median

import torch

from pydit import backend

PERIOD_SECONDS = 0.1
THROTTLE_BITS = {0x2: "application clocks", 0x4: "software power cap", 0x8: "hardware slowdown", 0x10: "sync boost",
                 0x20: "software thermal", 0x40: "hardware thermal", 0x80: "power brake", 0x100: "display clocks"}
# Dense bf16 TFLOP/s of the data sheet, by a part of the device's name.
PEAK_TFLOP_S = {"H200": 989.0, "H100 80GB HBM3": 989.0, "A100": 312.0}
UNITS = {"sm_clock_mhz": "MHz SM", "memory_clock_mhz": "MHz memory", "power_w": "W", "temperature_c": "C"}


def describe(device: str) -> dict:
    """Plain data: device, versions, commit and whether the tree differs from it, date."""
    info = backend.info()
    line = {"device": _processor(), "kind": device, "python": platform.python_version(), "torch": torch.__version__,
            "pydit": info["version"], "cuda_archs": info["cuda_archs"], "threads": torch.get_num_threads(),
            **_commit(), "date": time.strftime("%Y-%m-%d %H:%M:%S")}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        line |= {"device": properties.name, "peak_tflop_s": peak(properties.name), "cuda": torch.version.cuda,
                 "sms": properties.multi_processor_count,
                 "memory_gib": round(properties.total_memory / 2**30, 1)}
        del line["threads"]
    return line


def peak(device: str) -> float | None:
    """The data sheet's dense bf16 rate of a GPU, TFLOP/s; None where it is not known here."""
    return next((rate for name, rate in PEAK_TFLOP_S.items() if name in device), None)


def sentence(machine: dict) -> str:
    """The machine on one line, with what was sampled during the run."""
    parts = [machine["device"], *(f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "pydit", "python")
                                  if machine.get(name)),
             f"commit {machine['commit']}" + {True: " (dirty tree)", False: "", None: " (tree not checked)"}[
                 machine["dirty"]], machine["date"]]
    seen = machine.get("sampled") or {}
    parts += [f"{seen[name]['median']:.0f} {unit} ({seen[name]['min']:.0f} to {seen[name]['max']:.0f})"
              for name, unit in UNITS.items() if name in seen]
    if "power_limit_w" in machine:
        parts.append(f"limit {machine['power_limit_w']:.0f} W")
    if seen:
        parts.append("throttled: " + (", ".join(f"{name} {share:.0%}" for name, share in seen["throttled"].items())
                                      or "never"))
    elif machine.get("sampling_error"):
        parts.append(f"sensors not read: {machine['sampling_error']}")
    return " | ".join(parts)


class Sampler:
    """Reads clocks, power, temperature and throttle reasons of the current GPU in a thread, from enter to exit.

    ``result()`` gives what belongs in the machine line; without nvidia-ml-py or its library, the reason why not.
    """

    def __init__(self, device: str):
        self._rows: list[dict] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._facts: dict = {}
        if device != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml, self._handle = pynvml, _handle(pynvml)
            self._facts = {"driver": _text(pynvml.nvmlSystemGetDriverVersion())}
            with contextlib.suppress(pynvml.NVMLError):
                self._facts["power_limit_w"] = pynvml.nvmlDeviceGetPowerManagementLimit(self._handle) / 1000
            self._thread = threading.Thread(target=self._run, daemon=True)
        except Exception as error:  # optional: the package or the driver's library may be missing
            self._facts["sampling_error"] = " ".join(str(error).split()) or type(error).__name__

    def __enter__(self) -> Sampler:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def result(self, last: float | None = None) -> dict:
        """What was seen so far, or in the last seconds."""
        rows = list(self._rows)
        if last is not None:
            rows = rows[-max(1, round(last / PERIOD_SECONDS)):]
        return self._facts | ({"sampled": summarise(rows)} if rows else {})

    def _run(self) -> None:
        while not self._stop.is_set():
            self._rows.append(self._read())
            self._stop.wait(PERIOD_SECONDS)

    def _read(self) -> dict:
        nvml, handle, row = self._nvml, self._handle, {}
        reasons = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None) \
            or nvml.nvmlDeviceGetCurrentClocksThrottleReasons
        for name, read in (("sm_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
                           ("memory_clock_mhz", lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
                           ("power_w", lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
                           ("temperature_c", lambda: nvml.nvmlDeviceGetTemperature(handle,
                                                                                   nvml.NVML_TEMPERATURE_GPU)),
                           ("throttle", lambda: reasons(handle))):
            with contextlib.suppress(nvml.NVMLError):  # a virtual GPU may lack a sensor
                row[name] = read()
        return row


def summarise(rows: list[dict]) -> dict:
    """Minimum, median and maximum per sensor; per throttle reason the share of samples that showed it."""
    seen = {}
    for name in UNITS:
        values = [row[name] for row in rows if name in row]
        if values:
            seen[name] = {"min": min(values), "median": median(values), "max": max(values)}
    masks = [row["throttle"] for row in rows if "throttle" in row]
    counts = {name: sum(bool(mask & bit) for mask in masks) for bit, name in THROTTLE_BITS.items()}
    return seen | {"throttled": {name: n / len(masks) for name, n in counts.items() if n}, "samples": len(rows)}


def together(machines: list[dict]) -> dict:
    """What several processes sampled on one machine, as one: of medians the median, of shares the mean by samples."""
    seen = [machine["sampled"] for machine in machines if machine.get("sampled")]
    total = sum(one["samples"] for one in seen)
    if not total:
        return {}
    merged = {}
    for name in UNITS:
        each = [one[name] for one in seen if name in one]
        if each:
            merged[name] = {"min": min(one["min"] for one in each), "median": median(one["median"] for one in each),
                            "max": max(one["max"] for one in each)}
    shares = {name: sum(one["throttled"].get(name, 0.0) * one["samples"] for one in seen) / total
              for name in THROTTLE_BITS.values()}
    return {"sampled": merged | {"throttled": {name: share for name, share in shares.items() if share},
                                 "samples": total}}


def _handle(nvml):
    """The current torch device as NVML sees it: by UUID, as CUDA_VISIBLE_DEVICES renumbers."""
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    if uuid is not None:
        with contextlib.suppress(nvml.NVMLError):
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return nvml.nvmlDeviceGetHandleByIndex(index)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> dict:
    def git(*args):
        return subprocess.run(["git", *args], capture_output=True, text=True, check=True, timeout=20,
                              cwd=Path(__file__).parent).stdout.strip()

    try:
        return {"commit": git("rev-parse", "--short", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):  # no git here, or no repository
        return {"commit": os.environ.get("COMMIT") or "unknown", "dirty": None}
