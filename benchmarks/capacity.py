"""Simulate a fleet of gateways: arrivals, queues with deadlines, autoscaling. And check it against a real gateway.

python benchmarks/capacity.py simulate --rate 1000 --seconds-per-image 0.06 --workers 2
python benchmarks/capacity.py check --images 200 --load 0.8
python benchmarks/capacity.py cost --core-hour 0.04 --gpu-hour 2.5 --gpu-tflops 120
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import json
import math
import random
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Fleet:
    """Replicas of a gateway. An image that cannot be purified within ``deadline_s`` is refused when it arrives."""

    seconds_per_image: float
    workers: int = 2
    deadline_s: float = 30.0
    fewest: int = 2
    most: int = 500
    spread: float = 1.0  # 0: all images take the same time; 1: half of it is exponential, as sizes vary
    queue: float = 4.0  # images that wait per replica, and
    busy: float = 0.7  # share of the workers' time: the targets of the autoscaler in deploy/kubernetes
    period_s: float = 15.0  # between two looks of the autoscaler
    start_s: float = 30.0  # until a new replica is ready
    window_s: float = 300.0  # the autoscaler takes replicas away that nobody has needed for that long


@dataclass
class Outcome:
    served: int = 0
    refused: int = 0
    times: list[float] = field(default_factory=list)  # in the gateway, seconds
    replicas: list[int] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        times = sorted(self.times) or [0.0]
        return times[int(share * (len(times) - 1))]

    def summary(self) -> str:
        share = self.refused / max(1, self.served + self.refused)
        return (
            f"served {self.served:,}, refused {share:.2%}, in the gateway p50 {self.quantile(0.5):.2f} s, "
            f"p99 {self.quantile(0.99):.2f} s, replicas {min(self.replicas)} to {max(self.replicas)}, "
            f"at the end {self.replicas[-1]}"
        )


def simulate(fleet: Fleet, rate: float, seconds: float, seed: int = 0, *, settled_s: float = 0.0) -> Outcome:
    """Poisson arrivals at ``rate`` images a second, at random replicas; counted from ``settled_s`` on."""
    chance, outcome, now, look = random.Random(seed), Outcome(replicas=[fleet.fewest]), 0.0, fleet.period_s
    replicas = [[0.0] * fleet.workers for _ in range(fleet.fewest)]  # when each worker is free
    starting: list[float] = []  # when each new replica is ready
    wishes: deque[tuple[float, int]] = deque()
    work_done = 0.0  # seconds of work since the last look
    while now < seconds:
        now += chance.expovariate(rate)
        while starting and starting[0] <= now:
            heapq.heappop(starting)
            replicas.append([now] * fleet.workers)
        if now >= look:
            look += fleet.period_s
            scale(fleet, now, work_done / fleet.period_s, replicas, starting, wishes)
            work_done = 0.0
            outcome.replicas.append(len(replicas))
        workers = chance.choice(replicas)
        first = min(range(fleet.workers), key=workers.__getitem__)
        work = fleet.seconds_per_image * (1 - fleet.spread / 2 + fleet.spread * chance.expovariate(2.0))
        start = max(now, workers[first])
        late = start + work - now > fleet.deadline_s
        if not late:
            workers[first] = start + work
            work_done += work
        if now >= settled_s:
            outcome.refused += late
            outcome.served += not late
            outcome.times += [] if late else [start + work - now]
    return outcome


def scale(
    fleet: Fleet,
    now: float,
    offered: float,
    replicas: list[list[float]],
    starting: list[float],
    wishes: deque[tuple[float, int]],
) -> None:
    """What Kubernetes does: enough for both targets, at most twice as many at a time, fewer after a while.

    ``offered`` is the work that has arrived, in seconds per second.
    """
    ahead = sum(max(0.0, free - now) for workers in replicas for free in workers) / fleet.seconds_per_image
    waiting = max(0.0, ahead - len(replicas) * fleet.workers)
    busy = min(offered / fleet.workers, len(replicas)) / fleet.busy
    wishes.append((now, math.ceil(max(waiting / fleet.queue, busy))))
    while wishes[0][0] < now - fleet.window_s:
        wishes.popleft()
    ready = len(replicas) + len(starting)
    wanted = max(fleet.fewest, min(wishes[-1][1], 2 * ready, fleet.most))
    for _ in range(wanted - ready):
        heapq.heappush(starting, now + fleet.start_s)
    keep = max(fleet.fewest, max(wish for _, wish in wishes))
    if now > fleet.window_s and len(replicas) > keep:
        del replicas[keep:]  # they finish what they have


async def check(images: int, load: float, side: int, sleep_s: float) -> None:
    """Send Poisson arrivals at ``load`` of its capacity to one gateway with one worker, and simulate the same.

    With ``sleep_s`` the purifier only waits that long, so that a busy machine does not disturb the queue.
    """
    import torch
    from torch import Generator, Tensor

    from codefend import Purifier
    from codefend.core import images as files
    from codefend.gateway.engine import Caller, Terms
    from codefend.gateway.lane import Lane
    from codefend.gateway.local import local_engine
    from codefend.gateway.options import LaneOptions

    class Sleeping(Purifier):
        name = "sleeping"

        def transform(self, images: Tensor, generator: Generator | None) -> Tensor:
            time.sleep(sleep_s)
            return images

    engine = local_engine(
        Sleeping() if sleep_s else "bridge", lane=LaneOptions(workers=1, batch_images=1, cache_bytes=0)
    )
    assert isinstance(engine.lane, Lane)

    def image(seed: int) -> bytes:
        return files.encode(torch.rand(3, side, side, generator=torch.Generator().manual_seed(seed)))

    payloads = [image(seed) for seed in range(images)]
    alone, served = list[float](), list[float]()
    engine.lane.on_batch = lambda count, seconds: served.append(seconds)  # batches of one image, in order
    for index in range(12):
        start = time.perf_counter()
        await engine.purify_file(image(10_000 + index), Terms(), Caller())
        alone.append(time.perf_counter() - start)
    service = statistics.mean(served[2:])
    outside = statistics.mean(alone[2:]) - service  # the worker is free for the next image meanwhile
    del served[:]
    chance, tasks, loop = random.Random(0), [], asyncio.get_running_loop()
    arrivals: list[float] = []

    async def send(data: bytes) -> float:
        start = loop.time()
        arrivals.append(start)
        await engine.purify_file(data, Terms(), Caller())
        return loop.time() - start

    for data in payloads:
        tasks.append(asyncio.create_task(send(data)))
        await asyncio.sleep(chance.expovariate(load / service))
    real = Outcome(times=list(await asyncio.gather(*tasks)))
    await engine.lane.close()
    print(f"alone: worker {service:.3f} s, outside {outside:.3f} s")
    print(f"worker under load: mean {statistics.mean(served):.3f} s, p95 {_p95(served):.3f} s")
    outcomes = {
        "gateway": real,
        "model, one time for all images": _queue(arrivals, [service] * images, outside),
        "model, each image's own time": _queue(arrivals, served, outside),
    }
    for label, outcome in outcomes.items():
        print(f"{label}: p50 {outcome.quantile(0.5):.3f} s, p95 {outcome.quantile(0.95):.3f} s")


def _p95(times: list[float]) -> float:
    return Outcome(times=times).quantile(0.95)


def _queue(arrivals: list[float], services: list[float], outside: float) -> Outcome:
    """The queue of the simulation, with one worker, these arrivals and these times in the worker and outside it."""
    free, outcome = 0.0, Outcome()
    for arrival, service in zip(arrivals, services, strict=True):
        free = max(arrival, free) + service
        outcome.times.append(free - arrival + outside)
    return outcome


def cost(core_hour: float, gpu_hour: float, gpu_tflops: float) -> None:
    """Dollars per million images of one megapixel: measured on two cores, and by arithmetic on an assumed GPU."""
    from codefend import load_purifier

    rows = json.loads((Path(__file__).parents[1] / "results" / "cost.json").read_text())["runs"]
    seconds = {row["id"]: row["value"] for run in rows for row in run["rows"]}
    for name in ("bridge", "bridge-detail", "bridge-large"):
        cpu = {kind: seconds[f"{name}/time/{kind}"] for kind in ("float32", "bfloat16")}
        work = 2 * load_purifier(name).multiply_adds(1024, 1024) / 1e12
        dollars = {kind: 2 * value * 1e6 / 3600 * core_hour for kind, value in cpu.items()}
        gpu = work / gpu_tflops
        print(
            f"| `{name}` | {work:.2f} | ${dollars['float32']:.1f} | ${dollars['bfloat16']:.1f} | "
            f"{1 / gpu:,.0f} | ${gpu * 1e6 / 3600 * gpu_hour:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    fleet = verbs.add_parser("simulate")
    fleet.add_argument("--rate", type=float, default=1000)
    fleet.add_argument("--seconds-per-image", type=float, required=True)
    fleet.add_argument("--workers", type=int, default=2)
    fleet.add_argument("--seconds", type=float, default=1800)
    real = verbs.add_parser("check")
    real.add_argument("--images", type=int, default=200)
    real.add_argument("--load", type=float, default=0.8)
    real.add_argument("--side", type=int, default=64)
    real.add_argument("--sleep", type=float, default=0.0, help="seconds, in place of the bridge")
    price = verbs.add_parser("cost")
    price.add_argument("--core-hour", type=float, default=0.04, help="dollars")
    price.add_argument("--gpu-hour", type=float, default=2.5, help="dollars")
    price.add_argument("--gpu-tflops", type=float, default=120, help="that convolutions reach, not the data sheet's")
    arguments = parser.parse_args()
    if arguments.verb == "cost":
        cost(arguments.core_hour, arguments.gpu_hour, arguments.gpu_tflops)
        return
    if arguments.verb == "check":
        asyncio.run(check(arguments.images, arguments.load, arguments.side, arguments.sleep))
        return
    options = Fleet(arguments.seconds_per_image, arguments.workers)
    print("from the start:", simulate(options, arguments.rate, arguments.seconds).summary())
    settled = simulate(options, arguments.rate, arguments.seconds, settled_s=arguments.seconds / 2)
    print("second half:   ", settled.summary())


if __name__ == "__main__":
    main()
