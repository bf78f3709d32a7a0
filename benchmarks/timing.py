"""How the benchmarks measure: eager wall time, CUDA-graph time with warm and cold L2, peak memory, the device's limits.

Every function that takes several calls measures them in turn, round by round, so that drifting clocks and temperatures
meet all of them alike. Whatever is to be captured has to run on `side_stream()`, its preparation included: autograd
runs a backward on the stream of its forward, and the default stream cannot be captured.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

Call = Callable[[], object]
BUDGET = 0.1  # seconds per call and kind of measurement
LEAST_ROUNDS, MOST_ROUNDS = 3, 40
BATCH_SECONDS = 0.01  # of calls between two looks at the clock
MOST_CALLS = 50  # in one graph
SLOWEST_CAPTURED = 0.05  # seconds: what takes longer is not bound by its launches, and its graph would be huge
FLUSH_FACTOR = 3  # times the L2 that are read to empty it


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def side_stream() -> AbstractContextManager:
    """Context in which CUDA work goes to the stream that `graph_us` captures; nothing without CUDA."""
    return torch.cuda.stream(_stream()) if torch.cuda.is_available() else nullcontext()


def release() -> None:
    """Give cached memory back, so that one case's leftovers do not become another's lack."""
    gc.collect()
    if torch.cuda.is_available() and not _broken_captures:
        torch.cuda.empty_cache()


def spread(values: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    quantiles = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64))
    return dict(zip(("p20", "median", "p80"), quantiles.tolist(), strict=True))


def seconds(call: Call) -> float:
    """Wall time of one synchronised call: an estimate to plan with."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def batch_size(call: Call, most: int = 1000) -> int:
    """Calls that fill BATCH_SECONDS."""
    return max(1, min(most, int(BATCH_SECONDS / seconds(call))))


def eager_us(calls: Mapping[str, Call], budget: float = BUDGET) -> dict[str, dict[str, float]]:
    """Name -> spread of the wall time per call in µs, host and device: batches of calls with one synchronisation.

    The calls must have run before. Each takes about `budget` seconds, or LEAST_ROUNDS batches.
    """
    sizes = {name: batch_size(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent = dict.fromkeys(calls, 0.0)
    for round_ in range(MOST_ROUNDS):
        for name, call in calls.items():
            if round_ >= LEAST_ROUNDS and spent[name] >= budget:
                continue
            synchronize()
            start = time.perf_counter()
            for _ in range(sizes[name]):
                call()
            synchronize()
            elapsed = time.perf_counter() - start
            spent[name] += elapsed
            times[name].append(elapsed / sizes[name] * 1e6)
    return {name: spread(values) for name, values in times.items()}


def graph_us(
    calls: Mapping[str, Call], cold: bool = False, budget: float = BUDGET
) -> dict[str, dict[str, float] | None]:
    """Name -> spread of the device time per call in µs inside a CUDA graph, or None for what cannot be captured.

    A graph holds several calls back to back. cold: before each call the L2 is filled with other, clean data; a graph
    of the flushes alone is measured in the same rounds and subtracted. None for calls that wait for the device, take
    longer than SLOWEST_CAPTURED, or fail in capture, and without CUDA. The calls must have run before, on
    `side_stream()`.
    """
    result: dict[str, dict[str, float] | None] = dict.fromkeys(calls)
    if not torch.cuda.is_available():
        return result
    with side_stream():
        if cold:
            _flush()  # once before, so that its buffer belongs to no graph
        graphs: dict[str, torch.cuda.CUDAGraph] = {}
        counts: dict[str, int] = {}
        for name, call in calls.items():
            estimate = seconds(call)
            if estimate > SLOWEST_CAPTURED or _waits(call):
                continue
            counts[name] = max(1, min(MOST_CALLS, int(BATCH_SECONDS / estimate)))
            try:
                graphs[name] = _capture(_flushed(call) if cold else call, counts[name])
            except RuntimeError as error:
                _broken_captures.append(f"{name}: {error}")
        flushes: dict[int, torch.cuda.CUDAGraph] = {}
        if cold:
            flushes = {count: _capture(_flush, count) for count in {counts[name] for name in graphs}}
        for graph in (*graphs.values(), *flushes.values()):
            graph.replay()
        torch.cuda.synchronize()
        times: dict[str, list[float]] = {name: [] for name in graphs}
        idle: dict[int, list[float]] = {count: [] for count in flushes}
        start = time.perf_counter()
        for round_ in range(MOST_ROUNDS):
            if round_ >= LEAST_ROUNDS and time.perf_counter() - start > budget * len(graphs):
                break
            # all of a round is enqueued before the clock is read: no gap of the host between event and graph
            events = [(times[name], counts[name], _timed(graph)) for name, graph in graphs.items()]
            events += [(idle[count], count, _timed(graph)) for count, graph in flushes.items()]
            torch.cuda.synchronize()
            for values, count, (begin, end) in events:
                values.append(begin.elapsed_time(end) / count * 1e3)
        for name, values in times.items():
            flush = spread(idle[counts[name]])["median"] if cold else 0.0
            result[name] = spread([value - flush for value in values])
    return result


def peak_mib(call: Call) -> float | None:
    """MiB that one call takes at most, its results included, over what was allocated before; None without CUDA."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@cache
def ceilings() -> dict[str, float] | None:
    """What this device reaches with PyTorch's own operators, measured once per process; None without CUDA.

    copy_gb_per_s: read and written together, 1 GiB; write_gb_per_s: `fill_` of 1 GiB; l2_read_gb_per_s: the better of
    two sums that read a third of the L2 again and again; fp32_tflops: matrix product of 8192² without TF32, a fused
    multiply-add counting two.
    """
    if not torch.cuda.is_available():
        return None
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with side_stream():
            giga = _reached()
    finally:
        torch.set_float32_matmul_precision(precision)
        release()
    return {
        "copy_gb_per_s": giga["copy"],
        "write_gb_per_s": giga["write"],
        "l2_read_gb_per_s": max(giga["l2 rows"], giga["l2 bags"]),
        "fp32_tflops": giga["product"] / 1e3,
    }


def _reached() -> dict[str, float]:
    """Name -> billions of bytes or operations per second."""
    source, target = (torch.zeros(2**28, device="cuda") for _ in range(2))
    resident = torch.zeros(_l2_bytes() // 3 // 1024, 256, device="cuda")
    repeats, rows = 64, len(resident)
    index = torch.randint(rows, (repeats * rows // 16, 16), generator=torch.Generator().manual_seed(0)).cuda()
    # values matter: products of zeros draw less power and run at higher clocks
    matrix = torch.randn(8192, 8192, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    calls: dict[str, tuple[Call, float]] = {
        "copy": (lambda: target.copy_(source), 2 * source.nbytes),
        "write": (lambda: target.fill_(1), target.nbytes),
        "l2 rows": (lambda: resident.flatten().expand(repeats, -1).sum(1), repeats * resident.nbytes),
        "l2 bags": (
            lambda: torch.nn.functional.embedding_bag(index, resident, mode="sum"),
            index.numel() * resident[0].nbytes,
        ),
        "product": (lambda: matrix @ matrix, 2 * len(matrix) ** 3),
    }
    for call, _ in calls.values():
        call()
    times = graph_us({name: call for name, (call, _) in calls.items()})
    return {name: work / times[name]["median"] / 1e3 for name, (_, work) in calls.items()}


_broken_captures: list[str] = []  # after a failed capture the allocator refuses to empty its cache


def _waits(call: Call) -> bool:
    """Whether a call waits for the device, which a capture forbids. Asked first: a failed capture leaves traces."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return False


def _capture(call: Call, count: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    gc.disable()  # collecting an old graph would break the capture
    try:
        graph.capture_begin()
        try:
            for _ in range(count):
                call()
        finally:
            graph.capture_end()
    finally:
        gc.enable()
    return graph


def _timed(graph: torch.cuda.CUDAGraph) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    return begin, end


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties().L2_cache_size


@cache
def _flush_buffer() -> torch.Tensor:
    return torch.zeros(math.ceil(FLUSH_FACTOR * _l2_bytes() / 4), device="cuda")


def _flush() -> object:
    """Reading, not writing: dirty lines would have to be written back during the measured call."""
    return _flush_buffer().amax()


def _flushed(call: Call) -> Call:
    def flush_and_call() -> None:
        _flush()
        call()

    return flush_and_call
