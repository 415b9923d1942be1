"""What helps before and beside a training: rehearsals, range tests, and the first-hour checks."""

from loopkit.debug.check import Report, check
from loopkit.debug.findings import Finding
from loopkit.debug.memory import find_batch_size
from loopkit.debug.overflow import detect_overflow
from loopkit.debug.rates import LrCurve, find_lr
from loopkit.debug.rehearse import Rehearsal, fast_dev_run, overfit, sanity_check

__all__ = [
    "Finding",
    "LrCurve",
    "Rehearsal",
    "Report",
    "check",
    "detect_overflow",
    "fast_dev_run",
    "find_batch_size",
    "find_lr",
    "overfit",
    "sanity_check",
]
