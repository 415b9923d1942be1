"""The example of a run that is killed and run again.

One process is the script; the lives of the other run are forked from one that has imported it.
"""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]


SCRIPT = ROOT / "examples" / "resume.py"
LIVES = """
    import gc, os, sys
    import resume, torch

    resume.MulticlassAccuracy(10)
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())  # the first one imports a lot
    gc.freeze()  # at a life's end all of that need not be walked through
    for line in sys.stdin:
        life = os.fork()
        if not life:
            resume.main(line.split())
            sys.exit()
        print("ended with", os.waitstatus_to_exitcode(os.waitpid(life, 0)[1]), flush=True)
"""


def started(*command, **given):
    """A process of its own, which warns of nothing."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-u", *command], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}"}, **given,
    )  # fmt: skip


def lived(lives, folder, signum=None, epochs=0):
    """What a life says until its end; it is sent the signal after some lines, each an epoch's."""
    slow = "0.02" if signum else "0"
    print("--folder", folder, "--slow", slow, file=lives.stdin, flush=True)
    lines = [lives.stdout.readline() for _ in range(1 + epochs)]
    if signum:
        os.kill(int(lines[0].split()[1]), signum)
    while not lines[-1].startswith("ended with"):
        lines.append(lives.stdout.readline())
        assert lines[-1], lives.stderr.read()
    return lines


def test_it_comes_to_the_same_result_however_often_it_is_stopped(tmp_path):
    """Ctrl-C, SIGTERM and kill -9, in turn; then it ends with the very same weights."""
    whole = started(SCRIPT, "--folder", str(tmp_path / "whole"))
    lives = started("-c", textwrap.dedent(LIVES), stdin=subprocess.PIPE)
    try:
        for signum, epochs in ((signal.SIGINT, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)):
            lines = lived(lives, tmp_path / "run", signum, epochs)
            code = -9 if signum == signal.SIGKILL else 128 + signum
            assert lines[-1] == f"ended with {code}\n", lines
            assert any("asked to stop" in line for line in lines) == (signum != signal.SIGKILL)
        assert "goes on" in lines[0]
        *said, last, end = lived(lives, tmp_path / "run")
        assert "goes on" in said[0]
        assert end == "ended with 0\n"
        assert lives.communicate(timeout=100)[1] == ""
        out, err = whole.communicate(timeout=200)
    finally:
        whole.kill()
        lives.kill()
    assert (whole.returncode, err) == (0, "")
    assert out.splitlines()[-1] == last.strip()
    assert last.startswith("done after 176 updates: ")
