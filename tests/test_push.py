"""Bulk pushes from a real store process into this one, on the CPU and through CUDA IPC."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterator
from itertools import cycle, islice, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clo.gpu_worker.cache import staging
from clo.gpu_worker.cache.staging import Staging
from clo.kernels.flag import wait
from clo.kvstore.arena import Arena
from clo.kvstore.client import StoreClient
from clo.kvstore.layout import arena_tensor
from clo.kvstore.push import PAGE_BYTES, Source
from clo.runtime.config import BlockConfig
from clo.runtime.model.kv_shape import KVShape, LayerSpec
from clo.runtime.wire.errors import CLOError, DeviceStuck, ProtocolError
from clo.runtime.wire.messages import (
    Allocate,
    Allocated,
    Attach,
    Denied,
    Free,
    Freed,
    GPUMemory,
    OpenStaging,
    Push,
)
from clo.runtime.wire.sockets import encode
from tests.store import WAIT_MS, Store, ask, own_store, running_store

SHAPE = KVShape((LayerSpec(),) * 4, query_heads=4, kv_heads=2, head_dim=64, dtype_name="float32")
MOST = 4  # blocks of a request
BYTES = 2 * MOST * SHAPE.block_bytes // SHAPE.layers  # of a staging
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Worker:
    """An attached client, and the arena [layers, kv_heads, blocks, block_tokens, 2, head_dim]."""

    def __init__(self, store: Store, number: int) -> None:
        self.client: StoreClient = store.client()
        self.attached = self.client.attach(Attach(number, os.getpid()), WAIT_MS / 1000)
        shared = Arena.open(self.attached.pid, self.attached.fd, self.attached.arena_bytes)
        self.arena = arena_tensor(shared, SHAPE, self.attached.blocks)

    def allocate(self, sequence: int, blocks: int) -> list[int]:
        answer = ask(self.client, Allocate(sequence, blocks))
        assert isinstance(answer, Allocated)
        return answer.blocks

    def expected(self, layer: int, blocks: list[int]) -> Tensor:
        return self.arena[layer, :, blocks].flatten(1, 2)

    def denied(self, message: Push | OpenStaging) -> Denied:
        answer = ask(self.client, message)
        assert isinstance(answer, Denied)
        return answer


@pytest.fixture
def store() -> Iterator[Store]:
    block = BlockConfig(SHAPE.layers, SHAPE.kv_heads, SHAPE.block_tokens, SHAPE.block_bytes)
    with running_store(block=block) as store:
        yield store


@pytest.fixture
def worker(store: Store) -> Worker:
    worker = Worker(store, 0)
    worker.arena.normal_()
    return worker


def stream(opened: Staging, layers: list[int]) -> Iterator[Tensor]:
    """The rows of each layer, each asked for as early as it may be."""
    numbers: deque[int] = deque()
    ahead = iter(layers)
    coming = next(ahead, None)
    for _ in layers:
        while coming is not None:
            if (number := opened.request(coming)) is not None:
                numbers.append(number)
                coming = next(ahead, None)
            elif numbers:
                break
            else:  # until the device has come to the last wait
                time.sleep(1e-3)
        yield opened.wait(numbers.popleft())


@pytest.mark.parametrize("device", DEVICES)
def test_what_is_pushed_is_what_the_arena_holds(worker: Worker, device: str) -> None:
    for sequence, count in ((1, 3), (2, 2), (3, 4)):
        worker.allocate(sequence, count)
    for sequence, count in ((1, 3), (3, 4)):
        assert ask(worker.client, Free(sequence)) == Freed(sequence, count)
    blocks = worker.allocate(4, 6)
    assert any(after != before + 1 for before, after in pairwise(blocks))
    opened = Staging(worker.client, SHAPE, MOST, torch.device(device))
    for first, count in ((0, 4), (1, 1), (2, 4), (5, 1)):
        opened.begin(4, first, count)
        for layer, rows in enumerate(stream(opened, list(range(SHAPE.layers)))):
            assert rows.shape == (SHAPE.kv_heads, count * SHAPE.block_tokens, 2, SHAPE.head_dim)
            assert torch.equal(rows.cpu(), worker.expected(layer, blocks[first : first + count]))
    opened.check()


@pytest.mark.parametrize("device", DEVICES)
def test_a_half_is_filled_again_only_when_its_reader_is_done(worker: Worker, device: str) -> None:
    worker.allocate(1, 1)
    opened = Staging(worker.client, SHAPE, MOST, torch.device(device))
    opened.begin(1, 0, 1)
    first, second = opened.request(0), opened.request(1)
    assert (first, second) == (1, 2)
    opened.wait(1)
    assert opened.request(2) is None
    opened.wait(2)
    while (number := opened.request(2)) is None:  # until the device has come to the second wait
        time.sleep(1e-3)
    assert number == 3 and opened.request(3) is None
    opened.begin(1, 0, 1)  # leaves push 3 alone
    for _, rows in zip(range(3), stream(opened, [1, 2, 3]), strict=True):
        assert rows.isfinite().all()


def test_two_workers_have_a_staging_each(store: Store, worker: Worker) -> None:
    other = Worker(store, 1)
    pairs = [(each, each.allocate(7, 2)) for each in (worker, other)]
    stagings = [Staging(each.client, SHAPE, MOST, torch.device("cpu")) for each, _ in pairs]
    for opened, (each, blocks) in zip(stagings, pairs, strict=True):
        opened.begin(7, 0, 2)
        assert torch.equal(next(stream(opened, [3])), each.expected(3, blocks))


def test_pushes_on_the_cpu_load_neither_cuda_nor_torch(store: Store, worker: Worker) -> None:
    worker.allocate(1, 1)
    opened = Staging(worker.client, SHAPE, MOST, torch.device("cpu"))
    opened.begin(1, 0, 1)
    next(stream(opened, [0]))
    mapped = Path(f"/proc/{store.process.pid}/maps").read_text()
    assert "numpy" in mapped
    assert not any(name in mapped for name in ("cupy", "libcuda", "libtorch"))


@pytest.mark.parametrize(
    "wrong",
    [
        Push(1, 4, 0, 1, 0, 1),  # layer
        Push(1, 0, 1, 2, 0, 1),  # beyond the sequence
        Push(1, 0, 2**63 - 1, 2**63 - 1, 0, 1),
        Push(1, 0, 0, 2, BYTES - 1, 1),  # beyond the staging
        Push(1, 0, 0, 2, 2**63 - 1, 1),
        Push(2, 0, 0, 1, 0, 1),  # the sequence of another worker
        Push(3, 0, 0, 1, 0, 1),  # of nobody
        Push(1, 0, 0, 1, 0, 2**63 - 1),  # more than may be on their way
    ],
)
def test_a_push_that_cannot_be_is_denied(store: Store, worker: Worker, wrong: Push) -> None:
    blocks = worker.allocate(1, 2)
    Worker(store, 1).allocate(2, 2)
    opened = Staging(worker.client, SHAPE, MOST, torch.device("cpu"))
    denied = worker.denied(wrong)
    assert (denied.sequence, denied.code) == (wrong.sequence, "protocol")
    opened.begin(1, 0, 2)
    assert torch.equal(next(stream(opened, [2])), worker.expected(2, blocks))
    assert "grow" in worker.denied(Push(1, 0, 0, 1, 0, 1)).text  # this number has been


def test_what_is_no_staging_is_denied(store: Store, worker: Worker) -> None:
    worker.allocate(1, 2)
    assert worker.denied(Push(1, 0, 0, 1, 0, 1)).text == "A worker has to send OpenStaging before Push."
    fd = os.memfd_create("clo-test")
    os.ftruncate(fd, PAGE_BYTES + BYTES)
    unknown = GPUMemory("0000:00:00.0", bytes(64))
    for message, code in (
        (OpenStaging(2**31, BYTES, None), "protocol"),  # no such descriptor
        (OpenStaging(fd, BYTES + 8, None), "protocol"),  # smaller than it says
        (OpenStaging(fd, BYTES, unknown), "protocol"),  # a page, and rows behind it
    ):
        assert worker.denied(message).code == code, message
    os.ftruncate(fd, PAGE_BYTES)
    assert worker.denied(OpenStaging(fd, BYTES, unknown)).code == "config"  # unknown handle
    os.close(fd)
    with pytest.raises(ProtocolError, match="Attach"):
        store.client().open_staging(OpenStaging(0, 1, None), WAIT_MS / 1000)
    assert worker.denied(Push(1, 0, 0, 1, 0, 1)).text == "A worker has to send OpenStaging before Push."


def test_the_arena_itself_is_no_staging(worker: Worker) -> None:
    """Pushes into it would overwrite the rows of others."""
    attached = worker.attached
    fd = os.open(f"/proc/{attached.pid}/fd/{attached.fd}", os.O_RDWR | os.O_CLOEXEC)
    try:
        denied = worker.denied(OpenStaging(fd, attached.arena_bytes - PAGE_BYTES, None))
    finally:
        os.close(fd)
    assert denied.code == "protocol" and f"is no memory of {attached.arena_bytes} bytes" in denied.text


def test_a_worker_that_comes_back_has_to_open_its_staging_again(store: Store, worker: Worker) -> None:
    Staging(worker.client, SHAPE, MOST, torch.device("cpu"))
    successor = Worker(store, 0)
    successor.allocate(1, 1)
    assert "OpenStaging" in successor.denied(Push(1, 0, 0, 1, 0, 1)).text


def test_a_staging_that_is_replaced_or_whose_worker_is_gone_is_closed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the store would hold memory of a GPU for ever."""
    events: list[str] = []

    class Recorder:
        """A pusher that says what becomes of it."""

        def __init__(self, source: Source, pid: int, message: OpenStaging, *_: object) -> None:
            self._name = message.fd
            events.append(f"open {self._name}")

        def close(self) -> None:
            events.append(f"close {self._name}")

    monkeypatch.setattr("clo.kvstore.server.Pusher", Recorder)
    with own_store() as server:
        attach = Attach(0, os.getpid())
        for message in (attach, OpenStaging(1, 1, None), OpenStaging(2, 1, None), attach):
            server._answer(b"worker", encode(message))
    assert events == ["open 1", "close 1", "open 2", "close 2"]


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_never_come_end_in_an_error(
    store: Store, worker: Worker, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker.allocate(1, 1)
    opened = Staging(worker.client, SHAPE, MOST, torch.device(device))
    opened.begin(1, 0, 1)
    next(stream(opened, [0])).sum().item()  # they have come, so what never comes is the next ones
    usual = staging.STUCK_SECONDS
    monkeypatch.setattr(staging, "STUCK_SECONDS", 0.2)
    store.process.send_signal(signal.SIGSTOP)
    number = opened.request(1)
    assert number is not None
    start = time.monotonic()
    with pytest.raises(DeviceStuck, match="KV store"):
        opened.wait(number).sum().item()  # the CPU waits here, a GPU runs into the timeout behind this line
        opened.check()
    assert 0.2 <= time.monotonic() - start < 0.9 * usual
    for late in (lambda: opened.wait(number), lambda: opened.request(2), opened.check):
        with pytest.raises(DeviceStuck):
            late()
    assert torch.ones(1000, device=device).sum().item() == 1000


def test_the_reference_waits_until_the_number_is_there() -> None:
    flag, status = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    flag.fill_(7)
    wait(flag, 6, 0, status)
    wait(flag, 7, 0, status)
    assert int(status) == 0
    wait(flag, 8, 1, status)
    assert int(status) == 8
    start = time.monotonic()
    wait(flag, 9, 10**10, status)  # nothing waits once one wait was in vain
    assert int(status) == 8 and time.monotonic() - start < 9.0


@pytest.mark.gpu
def test_rows_are_complete_when_the_flag_is_there(worker: Worker) -> None:
    """The GPU stands at the flag before the copies begin, and compares at once."""
    blocks = worker.allocate(1, MOST)
    opened = Staging(worker.client, SHAPE, MOST, torch.device("cuda"))
    expected = [worker.expected(layer, blocks).cuda() for layer in range(SHAPE.layers)]
    layers = list(islice(cycle(range(SHAPE.layers)), 400))
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    opened.begin(1, 0, MOST)
    for layer in layers:
        while (number := opened.request(layer)) is None:
            pass
        wrong += (opened.wait(number) != expected[layer]).sum()
    assert wrong.item() == 0
    opened.check()


@pytest.mark.gpu
def test_memory_that_is_not_shared_is_denied_and_the_store_goes_on(worker: Worker) -> None:
    from cupy.cuda import runtime

    blocks = worker.allocate(1, 2)
    fd = os.memfd_create("clo-test")
    os.ftruncate(fd, PAGE_BYTES)
    bus = runtime.deviceGetPCIBusId(torch.cuda.current_device())
    with pytest.raises(CLOError, match="KV store cannot push"):
        worker.client.open_staging(OpenStaging(fd, BYTES, GPUMemory(bus, bytes(64))), WAIT_MS / 1000)
    os.close(fd)
    opened = Staging(worker.client, SHAPE, MOST, torch.device("cuda"))
    opened.begin(1, 0, 2)
    assert torch.equal(next(stream(opened, [1])).cpu(), worker.expected(1, blocks))
