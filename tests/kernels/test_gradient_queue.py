"""The queue of weight gradients: what waits for what, and what is held how long."""

import weakref
from contextlib import contextmanager

import pytest
import torch

from kernels.gradient_queue import SideStream, enqueue, join_for, queued
from kernels.registration import backend

from ..gradient_queues import UntilJoined


@pytest.fixture
def buffer() -> torch.Tensor:
    return torch.zeros(3, 100)


def write(rows: torch.Tensor) -> None:
    rows += 1


@pytest.mark.parametrize(
    ("other", "waits"),
    [
        (lambda b: b, True),
        (lambda b: b[:, 49:], True),
        (lambda b: b[2, 10:11], True),  # another task's row of the same columns
        (lambda b: b.view(-1), True),
        (lambda b: b[:, 8:12].view(3, 2, 2), True),
        (lambda b: b[:, 50:], False),
        (lambda b: b[1, :10], False),
        (lambda b: torch.zeros(3, 100), False),
        (lambda b: b.new_empty(0), False),
    ],
)
def test_an_operator_waits_for_its_columns_alone(buffer, other, waits):
    queue = UntilJoined()
    with queued(buffer, queue):
        enqueue(write, (buffer[:, 10:50].view(3, 5, 8),))
        assert buffer.count_nonzero() == 0
        join_for((None, 3, other(buffer)))
        assert queue.launched == waits
    assert queue.launched == 1
    assert buffer.sum() == 3 * 40


def test_a_buffer_without_a_queue_is_written_at_once(buffer):
    queue, other = UntilJoined(), torch.zeros(3, 100)
    with queued(buffer, queue), queued(other, None):
        enqueue(write, (other,))
    assert other.all()
    assert queue.launched == 0
    enqueue(write, (buffer,))
    assert buffer.all()


def test_every_operator_on_a_gpu_waits_or_is_queued(buffer, monkeypatch):
    """By its registration: nothing in the operator's own code can forget it."""
    registered, queue = {}, UntilJoined()
    monkeypatch.setattr(
        torch.library, "impl", lambda name, _key, run: registered.update({name: run})
    )
    backend.register_cuda("queued_", only_rows=True)(write)
    backend.register_cuda("other")(torch.Tensor.sum)
    with queued(buffer, queue):
        registered["superbert::queued_"](buffer)
        assert queue.launched == 0
        assert registered["superbert::other"](buffer) == 300
        assert queue.launched == 1


class Streams:
    """Stands in for torch.cuda's streams and events: writes down what waits for what."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        self.count = 0
        monkeypatch.setattr(torch.cuda, "Stream", lambda _device: Stream("side", self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: Stream("main", self))
        monkeypatch.setattr(torch.cuda, "Event", lambda: Event(self))
        monkeypatch.setattr(torch.cuda, "stream", self.within)

    @contextmanager
    def within(self, stream):
        self.log.append(f"on {stream.name}")
        yield


class Stream:
    device = None

    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self._log = name, streams.log

    def wait_stream(self, other: "Stream") -> None:
        self._log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: "Event") -> None:
        self._log.append(f"{self.name} waits for launch {event.number}")


class Event:
    def __init__(self, streams: Streams) -> None:
        self._streams, self.number = streams, -1

    def record(self, stream: Stream) -> None:
        assert stream.name == "side"
        self.number, self._streams.count = self._streams.count, self._streams.count + 1


def test_a_side_stream_branches_off_and_is_joined(monkeypatch):
    streams = Streams(monkeypatch)
    side, fork = SideStream(torch.device("cuda")), ["side waits for main", "on side"]
    side.join()
    assert streams.log == []  # nothing to join: no recording has another stream
    for _ in range(2):
        side.submit(lambda: streams.log.append("launch"), ())
    side.join()
    side.join()
    assert streams.log == [*fork, "launch", *fork, "launch", "main waits for side"]


def test_operands_are_held_until_they_are_waited_for(monkeypatch):
    streams, alive = Streams(monkeypatch), []
    side = SideStream(torch.device("cuda"), most=2)
    for number in range(4):
        operand = torch.zeros(1)
        alive.append(weakref.ref(operand))
        side.submit(lambda: None, (operand,))
        del operand
        waited = [f"main waits for launch {n}" for n in range(number - 1)]
        assert [line for line in streams.log if "for launch" in line] == waited
        assert [ref() is None for ref in alive] == [n < number - 1 for n in range(number + 1)]
        assert len(side.operands) == min(number + 1, 2)
    side.join()
    assert streams.log[-1] == "main waits for side"
    assert not any(ref() for ref in alive)


def test_a_launch_that_raises_is_joined(monkeypatch, buffer):
    streams = Streams(monkeypatch)
    side = SideStream(torch.device("cuda"))

    def fail(_rows: torch.Tensor) -> None:
        raise FloatingPointError

    with pytest.raises(FloatingPointError), queued(buffer, side):
        enqueue(fail, (buffer,))
    assert streams.log[-1] == "main waits for side"
    assert list(side.operands) == []
