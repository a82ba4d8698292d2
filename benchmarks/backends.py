"""One megapixel through torch, ONNX Runtime and OpenVINO, interleaved: seconds of processor time, and the difference.

python benchmarks/backends.py bridge:sigma=0 --side 1024 --repeats 3 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from codefend import load_purifier
from codefend.core.processes import keep_freed_memory
from codefend.purifiers.onnx_export import export_onnx

Run = Callable[[np.ndarray], np.ndarray]


def torch_run(name: str, *, channels_last: bool) -> Run:
    purifier = load_purifier(name)
    if channels_last:
        purifier = purifier.to(memory_format=torch.channels_last)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            batch = torch.from_numpy(images)
            if channels_last:
                batch = batch.contiguous(memory_format=torch.channels_last)
            return purifier.denoise(batch, None).clamp(0, 1).numpy()

    return run


def onnx_run(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def openvino_run(path: Path, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(str(path)), "CPU", settings)
    return lambda images: model(images)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("purifiers", nargs="*", default=["bridge:sigma=0"])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as `codefend purify` does; the other two keep theirs anyway
    images = np.random.default_rng(0).random((1, 3, arguments.side, arguments.side), dtype=np.float32)
    for name in arguments.purifiers:
        with tempfile.TemporaryDirectory() as folder:
            path = export_onnx(name, Path(folder) / "model.onnx").path
            runs = {
                "torch": torch_run(name, channels_last=False),
                "torch, channels last": torch_run(name, channels_last=True),
                "onnxruntime": onnx_run(path, arguments.threads),
                "openvino": openvino_run(path, arguments.threads),
            }
            report(name, runs, images, arguments.repeats)


def report(name: str, runs: dict[str, Run], images: np.ndarray, repeats: int) -> None:
    expected = runs["torch"](images)
    seconds: dict[str, list[float]] = {backend: [] for backend in runs}
    worst = dict.fromkeys(runs, 0.0)
    for repeat in range(repeats + 1):  # the first warms up
        for backend, run in runs.items():
            start = time.process_time()
            worst[backend] = float(np.abs(run(images) - expected).max())
            if repeat:
                seconds[backend].append(time.process_time() - start)
    base = statistics.median(seconds["torch"])
    for backend, times in seconds.items():
        median = statistics.median(times)
        print(
            f"{name} {backend}: {median:.2f} s of CPU, {base / median:.2f}x, differs by {worst[backend]:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
