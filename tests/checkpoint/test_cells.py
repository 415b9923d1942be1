"""The table of resumes on one process; those of several are in tests/distributed."""

import functools

import pytest

from resumes import CUTS, DATA, Cell, differences, gone_on, uncut


@functools.cache
def whole(of):
    """The run that was not cut; one for all ways to cut it, which change nothing."""
    fp16, workers, data, strategy = of
    cut = next(cut for cut in CUTS if cut.startswith("fp16") == fp16)
    return uncut(Cell(cut, workers, data, strategy))


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("data", [data for data in DATA if data != "iterable of each rank"])
def test_a_run_that_was_cut_is_the_run_that_was_not(tmp_path, data, workers, cut):
    """Weights, optimizer, averages, scale, clock, random numbers and samples, bit for bit."""
    if "stateful" in data:
        pytest.importorskip("torchdata.stateful_dataloader")
    cell = Cell(cut, workers, data)
    assert differences(whole(cell.uncut), gone_on(cell, tmp_path)) == []
