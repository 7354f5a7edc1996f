"""The Triton kernels compile for GPUs that are not there: no spills, shared memory that fits."""

from .compiled import SHARED_LIMIT, cases, compile_all, covering_cases


def test_no_spills_and_shared_memory_within_the_limit() -> None:
    table = compile_all(covering_cases())
    too_much = {case: needs for case, needs in table.items() if not needs.fit(case)}
    assert not too_much


def test_the_cases_compiled_here_cover_the_table() -> None:
    def pairs(table: list[tuple]) -> set[tuple]:
        return {(case[part], case[3]) for case in table for part in range(3)}

    every, here = list(cases()), list(covering_cases())
    assert len(here) == len(every) // len(SHARED_LIMIT)
    assert {case[:3] for case in here} == {case[:3] for case in every}
    assert pairs(here) == pairs(every)
