"""Choosing a device, and moving batches to it."""

import loopkit as lk
import pytest
import torch

from feeds import Counted

ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)


def test_auto_is_the_accelerator_where_there_is_one():
    """Without one it is the CPU."""
    assert lk.device() == lk.device("auto") == (ACCELERATOR or torch.device("cpu"))


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "meta"])
def test_what_every_machine_has_can_be_asked_for(name):
    """A name of such a device gives that device."""
    assert lk.device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu", "mtia", "hpu"])
@pytest.mark.skipif(ACCELERATOR is not None, reason="this machine may have it")
def test_a_device_that_is_not_there_is_an_error_when_it_is_asked_for(name):
    """It names what was asked for and what there is, before a tensor is moved."""
    with pytest.raises(lk.UsageError, match=rf"lk.device\('{name}'\): found no such device here"):
        lk.device(name)


@pytest.mark.parametrize("name", ["gpu", "", "cuda:x", "cpu:-1"])
def test_a_name_that_torch_does_not_know_is_an_error(name):
    """The error shows the name and proposes some."""
    with pytest.raises(lk.UsageError, match=r"a name that torch does not know(.|\n)*cuda:0"):
        lk.device(name)


def test_moving_to_where_it_is_copies_no_tensor():
    """On the same device the tensors are the same objects, in new containers."""
    batch = {"x": torch.ones(2)}
    moved = lk.to_device(batch, torch.device("cpu"))
    assert moved["x"] is batch["x"]
    assert moved is not batch


def test_on_the_cpu_batches_pass_through_untouched():
    """The same objects come in the same order, each read when it is asked for."""
    data = Counted([object() for _ in range(4)])
    passed = lk.prefetch(data, torch.device("cpu"))
    for i, batch in enumerate(data.batches, 1):
        assert next(passed) is batch
        assert data.read == i
    assert next(passed, None) is None


@pytest.mark.skipif(ACCELERATOR is None, reason="needs an accelerator")
def test_on_an_accelerator_batches_are_copied_one_ahead():
    """They arrive whole and in order, with one batch read beyond the one given out."""
    data = Counted([{"x": torch.full((1000,), i), "name": str(i)} for i in range(5)])
    for i, batch in enumerate(lk.prefetch(data, ACCELERATOR)):
        assert batch["x"].device.type == ACCELERATOR.type
        assert (batch["x"] == i).all()
        assert batch["name"] == str(i)
        assert data.read == min(i + 2, 5)


def test_of_a_list_each_process_gets_its_own(monkeypatch):
    """The place in the list is LOCAL_RANK, which torchrun sets; without it the first."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert lk.device(["cpu", "meta"]) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert lk.device(["cpu", "meta"]) == torch.device("meta")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(lk.UsageError, match="no device for the process of LOCAL_RANK 2"):
        lk.device(["cpu", "meta"])
    with pytest.raises(lk.UsageError, match=r"lk.device\(2\)"):
        lk.device(2)
