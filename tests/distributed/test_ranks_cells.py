"""The table of resumes on two ranks: many of its cells in one process group, which is cheaper."""

import os

import pytest

from pool import POOL
from resumes import CUTS, DATA, Cell, differences, gone_on, uncut

ALL = os.environ.get("LOOPKIT_CELLS") == "all"
STRATEGIES = ("ddp", "fsdp")


@pytest.fixture(autouse=True, scope="module")
def fresh_processes():
    """Ranks that have run no other test: data workers forked from those have crashed."""
    POOL.stop()


def cells_of(strategy, data, workers):
    """The cells of these: all, or every second one.

    What one strategy has with one number of workers the other has with the other. Of data that
    is each rank's own there are the cells that are cut most often.
    """
    turns = STRATEGIES.index(strategy) + [*DATA].index(data)
    own = data.endswith("of each rank")
    return [
        Cell(cut, workers, data, strategy)
        for number, cut in enumerate(CUTS)
        if ALL or (cut == "twice" if own else (number + turns) % 2 == (workers > 0))
    ]


def found_in(cells, folder):
    """What differs in each cell, on this rank."""
    whole, found = {}, {}
    for number, cell in enumerate(cells):
        if cell.uncut not in whole:
            whole[cell.uncut] = uncut(cell)
        found[cell] = differences(whole[cell.uncut], gone_on(cell, f"{folder}/{number}"))
    return found


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranks_that_were_cut_are_the_ranks_that_were_not(tmp_path, strategy, data, workers):
    """On each rank: weights, optimizer, averages, scale, clock, random numbers and samples.

    Less than half of the cells, or all if the environment variable LOOPKIT_CELLS is "all".
    """
    if "stateful" in data:
        pytest.importorskip("torchdata.stateful_dataloader")
    cells = cells_of(strategy, data, workers)
    for found in POOL.run(2, found_in, cells, str(tmp_path)):
        assert [*found] == cells
        assert {cell: what for cell, what in found.items() if what} == {}
