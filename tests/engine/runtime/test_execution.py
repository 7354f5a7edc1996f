"""Recording of steps, with a recorder that replays by calling the function again."""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from engine.runtime.execution import Execution, Recorded, Recording
from engine.utils.errors import InputError


class Numbers(NamedTuple):
    """A batch of one tensor."""

    values: Tensor
    tasks: tuple[str, ...] = ("sum",)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    @property
    def signature(self) -> int:
        return len(self.values)

    def map(self, move: Callable[[Tensor], Tensor]) -> "Numbers":
        return self._replace(values=move(self.values))


class Tape:
    """Stands in for CUDA graphs: a recording writes its result anew from its own batches."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def run(self, function, batches):
        self.log.append("run")
        return function(batches)

    def record(self, function, batches):
        self.log.append("record")
        own = [batch.map(Tensor.clone) for batch in batches]
        result = torch.full((), torch.nan)

        def replay() -> None:
            self.log.append("replay")
            result.copy_(function(own))

        return Recording(own, result, replay, lambda: self.log.append("release"))


def total(batches: Sequence[Numbers]) -> Tensor:
    return sum(batch.values.sum() for batch in batches)


def numbers(size: int, value: float) -> Numbers:
    return Numbers(torch.full((size,), value))


def test_the_second_call_of_a_signature_records_and_every_call_is_right() -> None:
    tape = Tape()
    function = Recorded(total, tape, limit=8)
    for value in (1.0, 2.0, 3.0):
        assert function([numbers(4, value)]) == 4 * value
    assert tape.log == ["run", "record", "replay", "replay"]
    assert function([numbers(5, 1.0)]) == 5
    assert function([numbers(4, 7.0)]) == 28
    assert tape.log[4:] == ["run", "replay"]


def test_batches_of_a_step_are_told_apart_by_all_their_signatures() -> None:
    tape = Tape()
    function = Recorded(total, tape, limit=8)
    for sizes in ((2, 3), (3, 2), (2, 3), (2, 3)):
        assert function([numbers(size, 1.0) for size in sizes]) == 5
    assert tape.log == ["run", "run", "record", "replay", "replay"]


def test_there_are_no_more_recordings_than_the_limit() -> None:
    tape = Tape()
    function = Recorded(total, tape, limit=2)
    for size in (1, 2, 3, 4) * 3:
        assert function([numbers(size, 1.0)]) == size
    assert len(function.recordings) == 2
    assert tape.log.count("record") == 2
    assert tape.log.count("replay") == 4
    assert function.beyond_limit == tape.log.count("run") - 4


def test_eager_leaves_functions_as_they_are() -> None:
    execution = Execution("auto", torch.device("cpu"))
    assert execution.kind == "eager"
    assert execution.compiled(total) is total
    assert execution.recorded(total) is total


def test_ranks_agree_on_what_is_new_and_on_what_is_recorded() -> None:
    asked: list[int] = []
    function = Recorded(total, Tape(), limit=2, agree=asked.append)
    for size in (4, 5, 4, 4, 5, 5, 6, 6):
        function([numbers(size, 1.0)])
    assert asked == [0, 2, 1, 3]  # 6 comes beyond the limit: it is not going to be recorded


def test_a_closed_execution_frees_its_recordings() -> None:
    execution, tape = Execution("eager", torch.device("cpu")), Tape()
    execution.kind, execution._recorder = "graphs", tape
    function = execution.recorded(total)
    for size in (4, 5, 4, 5):
        function([numbers(size, 1.0)])
    execution.close()
    execution.close()
    assert tape.log[-2:] == ["release", "release"]
    assert tape.log.count("release") == 2
    assert execution.num_graphs == 2  # what a run says of itself at its end
    assert function([numbers(4, 7.0)]) == 28


@pytest.mark.parametrize("kind", ["graphs", "compiled_graphs"])
def test_graphs_need_a_gpu(kind: str) -> None:
    with pytest.raises(InputError, match=f"execution = {kind}: needs a GPU"):
        Execution(kind, torch.device("cpu"))


def test_the_first_step_of_a_set_of_tasks_is_warm_up() -> None:
    execution = Execution("compile", torch.device("cpu"))
    function = execution.recorded(total)
    times = [0.0]
    for tasks in (("sum",), ("sum",), ("other",), ("sum",), ("other",)):
        function([numbers(3, 1.0)._replace(tasks=tasks)])
        times.append(execution.warmup_seconds)
    grew = [later > earlier for earlier, later in itertools.pairwise(times)]
    assert grew == [True, False, True, False, False]
