"""What the launcher knows of its children, and when it gives one up."""

import pytest

from clo.runtime.children import Children
from clo.runtime.wire.errors import WorkerDied
from clo.runtime.wire.liveness import SERVING_S, STALLED_S, STARTING_S


@pytest.fixture
def children() -> Children:
    """A worker and a store that are starting."""
    children = Children()
    children.expect(b"worker-0", "worker 0", 10)
    children.expect(b"store-numa0", "KV store numa0", 11)
    return children


@pytest.fixture
def serving(children: Children) -> Children:
    """The same two, ready and asked."""
    assert children.begin(b"worker-0", 10) and children.begin(b"store-numa0", 11)
    assert sorted(children.ask()) == [b"store-numa0", b"worker-0"]
    return children


def test_a_child_begins_with_its_own_pid_and_nobody_else_begins(children: Children) -> None:
    assert not children.begin(b"worker-0", 11) and not children.begin(b"worker-1", 10)
    assert not children.has_begun(b"worker-0") and not children.has_begun(b"worker-1")
    assert children.begin(b"worker-0", 10)
    assert children.has_begun(b"worker-0") and not children.ready
    assert children.begin(b"store-numa0", 11)
    assert children.ready


def test_a_child_that_starts_is_not_asked_and_has_its_own_budget(children: Children) -> None:
    children.begin(b"worker-0", 10)
    assert children.ask() == [b"worker-0"]
    children.answered(b"worker-0")
    assert not children.wait(STARTING_S - 1)
    assert not children.is_stalled(b"store-numa0"), "requests wait for it anyway"
    ((child, error),) = children.wait(1)
    assert child == b"store-numa0"
    assert isinstance(error, WorkerDied) and str(error) == "KV store numa0 was not ready within 1800 s"
    assert not children.wait(STARTING_S - 1), "it is given up once for each budget"


def test_a_silent_child_is_stalled_comes_back_or_is_given_up(serving: Children) -> None:
    serving.answered(b"store-numa0")
    serving.wait(STALLED_S - 1)
    assert not serving.is_stalled(b"worker-0")
    serving.wait(1)
    assert serving.is_stalled(b"worker-0") and not serving.is_stalled(b"store-numa0")
    assert serving.ask() == [b"store-numa0"], "a question that is open is not asked again"
    serving.answered(b"store-numa0")
    serving.wait(SERVING_S - STALLED_S - 1)
    serving.answered(b"worker-0")
    assert not serving.is_stalled(b"worker-0")
    serving.wait(SERVING_S)
    assert serving.ask() == [b"worker-0", b"store-numa0"]
    serving.answered(b"store-numa0")
    assert not serving.wait(SERVING_S - 1)
    ((child, error),) = serving.wait(1)
    assert child == b"worker-0" and str(error) == "worker 0 has not answered for 120 s"


def test_one_that_has_ended_is_neither_asked_nor_waited_for_and_cannot_begin() -> None:
    children = Children()
    children.expect(b"worker", "worker 0", 1)
    assert children.begin(b"worker", 1)
    children.end(b"worker")
    assert children.ask() == [] and children.wait(10 * SERVING_S) == []
    assert not children.begin(b"worker", 1), "what it said last comes late"
    children.expect(b"worker", "worker 0", 2)
    assert children.begin(b"worker", 2) and children.ask() == [b"worker"]
