"""The machine that a benchmark ran on, and the benchmark's rows in results.csv."""

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.csv")
FIELDS = ("date", "benchmark", "device", "versions", "case", "provider", "metric", "value", "unit")

Row = tuple[str, str, str, float, str]  # case, provider, metric, value, unit


def versions(*packages: str) -> str:
    """Return the versions of those packages that are installed."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return "; ".join(found)


def processor() -> str:
    """Return the name of the CPU, and how many cores this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def hardware() -> str:
    """Return the name of the GPU; without one, of the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else processor()


def append(
    rows: Iterable[Row], benchmark: str, device: str, versions: str, path: Path = RESULTS
) -> None:
    """Append rows of today, under a line of headings if the file is new."""
    about = (datetime.date.today().isoformat(), benchmark, device, versions)
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for case, provider, metric, value, unit in rows:
            writer.writerow((*about, case, provider, metric, f"{value:.6g}", unit))
