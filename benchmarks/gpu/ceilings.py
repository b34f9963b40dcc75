"""What the machine can do at most, measured in the same run as what is compared with it."""

from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.synthetic import Model

_GIB = 2**30


def seconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median device time of ``work``, after a warm-up."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3)
    return median(times)


def in_turn(works: Sequence[Callable[[], object]]) -> list[float]:
    """Median ``seconds`` of each of ``works``, in turn, so that all find the machine in the same state."""
    times = [[seconds(work, 8) for work in works] for _ in range(5)]
    return [median(each) for each in zip(*times, strict=True)]


def graph_of(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``work``, which has run once before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):  # as NCCL has a thread
        work()
    return graph


def copy_engine(pinned: Tensor) -> tuple[float, float]:
    """Bytes per second of the copy engine, to the GPU and back. pinned: at least 1 GiB of CPU memory."""
    host, device = pinned[:_GIB], torch.empty(_GIB, dtype=torch.uint8, device="cuda")
    to = seconds(lambda: device.copy_(host, non_blocking=True))
    back = seconds(lambda: host.copy_(device, non_blocking=True))
    return _GIB / to, _GIB / back


def hbm_copy() -> float:
    """Bytes per second, read and written, of a copy within GPU memory."""
    source = torch.empty(2 * _GIB, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 4 * _GIB / seconds(lambda: target.copy_(source), 30)


def gemm_step(model: Model, batch: int) -> float:
    """Seconds of all matrix products of a decode step, one graph, weights as large as the model's."""

    def random(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()

    inputs = {size: random(batch, size) for _, size in [*model.matrices.values(), (0, model.hidden)]}
    layers = [{name: random(*size) for name, size in model.matrices.items()} for _ in range(model.layers)]
    head = random(model.vocab, model.hidden)

    def step() -> None:
        for layer in layers:
            for weight in layer.values():
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        torch.nn.functional.linear(inputs[model.hidden], head)

    with torch.inference_mode():
        graph = graph_of(step)
    return seconds(graph.replay)


def full_attention(model: Model, context: int, hbm: float, memory: int | None = None) -> tuple[int, float]:
    """The floor of full attention whose KV never left the GPU: weights and KV are read as fast as it copies.

    Args:
        context: tokens of each sequence; hbm: bytes per second; memory: bytes of a GPU; None for this one's.

    Returns:
        (sequences that fit beside the weights into nine tenths of the GPU memory, tokens per second).
    """
    kv = context * model.shape.token_bytes
    memory = memory or torch.cuda.mem_get_info()[1]
    batch = int(0.9 * memory - model.weight_bytes) // kv
    return batch, batch * hbm / (model.bytes_read + batch * kv)
