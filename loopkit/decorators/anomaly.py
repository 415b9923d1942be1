"""Autograd's anomaly detection."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import attrs
import torch

from loopkit.compose import Decorator, wrap
from loopkit.state import TrainState
from loopkit.types import Around


@attrs.frozen
class DetectAnomaly:
    """The layer of `with_anomaly_detection`."""

    inner: Around
    check_nan: bool

    def __call__(self, state: TrainState, last: bool) -> AbstractContextManager[None]:
        """Anomaly detection round the micro-batch."""
        return self._entered(state, last)

    @contextmanager
    def _entered(self, state: TrainState, last: bool) -> Iterator[None]:
        with torch.autograd.set_detect_anomaly(True, self.check_nan), self.inner(state, last):
            yield


def with_anomaly_detection(*, check_nan: bool = True) -> Decorator:
    """Find the operation whose backward made the first NaN: slow, for debugging.

    An error in the backward pass then shows where its forward was written, and a NaN
    made in the backward pass is an error.

    Args:
        check_nan: Raise where the backward pass makes a NaN.

    Example:
        >>> with_anomaly_detection()
        with_anomaly_detection()

    Source: https://docs.pytorch.org/docs/stable/autograd.html#anomaly-detection
    """
    shown = "with_anomaly_detection()" if check_nan else "with_anomaly_detection(check_nan=False)"
    return wrap(name=shown, around=functools.partial(DetectAnomaly, check_nan=check_nan))
