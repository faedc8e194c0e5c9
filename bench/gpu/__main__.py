"""What a GPU can show, on a bare machine with one NVIDIA GPU and nothing to download: `make gpu`.

    python -m bench.gpu [--seconds 570] [--only STAGE ...] [--skip STAGE ...] [--device cuda] [--records FILE]

Every stage is a process of its own with a limit of time, and prints lines of JSON. The stages that only compare values
run side by side. Then the stages that measure speed run one by one. `--device cpu` tries the stages at toy size.

It needs torch, numpy, pillow, rich and safetensors. A stage whose packages are missing says so and ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch

from bench import harness
from bench.gpu import speed, values  # noqa: F401  (they add their stages)
from bench.gpu.place import STAGES, Found, Place


def origin(device: str) -> Found:
    """What every record says of where it comes from."""
    from deit.machine import described, resolve_device

    ours = harness.machine("torch")
    return {"gpu": described(resolve_device(device)), **{name: ours[name] for name in ("torch", "commit", "date")}}


class Runner:
    """Runs stages as processes, and writes every line that they print with the name of their stage."""

    def __init__(self, device: str, records: Path | None, end: float):
        self.device, self.records, self.end = device, records, end
        self.origin = origin(device)
        self.lock = threading.Lock()
        self.failed: list[str] = []

    def write(self, stage: str, found: Found) -> None:
        with self.lock:
            print(json.dumps({"stage": stage, **found}), flush=True)
            if self.records:
                with self.records.open("a", encoding="utf-8") as file:
                    print(json.dumps({"stage": stage, **found, **self.origin}), file=file)
        if found.get("ok") is False:
            self.failed.append(stage)

    def run(self, name: str) -> None:
        patience = 5 if self.device == "cpu" else 1
        limit = min(patience * STAGES[name].limit, self.end - time.monotonic())
        if limit < 5:
            return self.write(name, {"left out": "the time is up"})
        if missing := [package for package in STAGES[name].needs if not importlib.util.find_spec(package)]:
            return self.write(name, {"left out": f"{', '.join(missing)} is not installed"})
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as messages:
            process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu", "--device", self.device, "--stage", name, folder],
                stdout=subprocess.PIPE, stderr=messages, text=True, start_new_session=True,
                env=os.environ | ({} if STAGES[name].alone else {"OMP_NUM_THREADS": "2"}),
            )  # fmt: skip
            timer = threading.Timer(limit, lambda: os.killpg(process.pid, signal.SIGKILL))
            timer.start()
            assert process.stdout
            for line in process.stdout:
                with suppress(json.JSONDecodeError):
                    self.write(name, json.loads(line))
            status = process.wait()
            timer.cancel()
            seconds = round(time.monotonic() - began, 1)
            messages.seek(0)
            told = messages.read()
            if status:
                why = f"stopped after {limit:.0f} s" if status == -signal.SIGKILL else f"status {status}"
                self.write(name, {"ok": False, "failed": why, "messages": told[-2500:], "seconds": seconds})
            else:
                self.write(name, {"ended": True, "seconds": seconds, **({"messages": told[-600:]} if told else {})})
        return None


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the stages (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=570, help="ends after this time (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=tuple(STAGES), help="only these stages")
    parser.add_argument("--skip", nargs="+", choices=tuple(STAGES), default=[], help="not these stages")
    parser.add_argument("--records", type=Path, help="append the lines to this file")
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)  # its name, and a folder for its files
    options = parser.parse_args()
    if options.stage:
        name, folder = options.stage
        for found in STAGES[name].run(Place(options.device, Path(folder))):
            print(json.dumps(found), flush=True)
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("expected an NVIDIA GPU, but PyTorch sees none; try the stages with --device cpu", file=sys.stderr)
        return 2
    chosen = [name for name in options.only or STAGES if name not in options.skip]
    runner = Runner(options.device, options.records, time.monotonic() + options.seconds)
    together = [name for name in chosen if not STAGES[name].alone]
    with ThreadPoolExecutor(8 if options.device == "cuda" else 1) as pool:
        list(pool.map(runner.run, together))
    for name in chosen:
        if STAGES[name].alone:
            runner.run(name)
    runner.write("all", {"failed": sorted(set(runner.failed))})
    return 1 if runner.failed else 0


if __name__ == "__main__":
    sys.exit(main())
