"""A run that is killed at random instants comes to the end that it would have had."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
KILLS = os.environ.get("LOOPKIT_KILLS")


@pytest.mark.timeout(120 + 10 * int(KILLS or 10))
@pytest.mark.parametrize(("ranks", "kills"), [(1, KILLS or "10"), (2, KILLS or "4")])
def test_killed_and_restarted_runs_end_bitwise_equal(tmp_path, ranks, kills):
    """No save that was acknowledged is lost, nor the best; every end equals the whole run's.

    However often it is killed, there is at most one save of litter and one removal, then none.

    One process; and two whose shards lie in a file of each, killed one soon after the other.
    10 and 4 kills, or as many as the environment variable LOOPKIT_KILLS says.
    """
    path = f"{HERE.parents[1]}:{HERE.parent}"
    done = subprocess.run(
        [sys.executable, HERE / "killing.py", tmp_path, kills, "0", str(ranks)],
        env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    counts = json.loads(done.stdout)
    assert counts["kills"] >= int(kills)
    assert counts["wrong"] == []
    assert counts["equal"] == counts["runs"] > 0
    assert counts["litter"] == 0
    assert counts["after a kill"] <= 2
