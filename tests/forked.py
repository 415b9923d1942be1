"""Programs in processes of their own, forked from one that has imported what they all need.

Each ends as a process of Python does: its exit handlers run, and threads are waited for. What
importing does is another claim, and needs a process that is started anew.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

LIMIT_S = 200


class Starter:
    """A process that forks programs, one after the other; started when it is first asked."""

    def __init__(self):
        self.process = None

    @contextlib.contextmanager
    def begin(self, code, *arguments, env=None, cwd=None, terminal=None, strict=True):
        """A program that runs while the block does, in a session of its own.

        Args:
            code: Python.
            *arguments: After `sys.argv[0]`.
            env: Its environment; by default that of this process.
            cwd: Where it runs.
            terminal: The path of one, to write to in place of `stdout` and `stderr`.
            strict: Whether warnings are errors.
        """
        with tempfile.TemporaryDirectory() as folder:
            out, err = ([terminal] * 2) if terminal else (f"{folder}/out", f"{folder}/err")
            if not terminal:
                os.mkfifo(out)
            asked = {
                "code": code, "arguments": [*map(str, arguments)], "out": out, "err": err,
                "env": {**(os.environ if env is None else env)}, "cwd": str(cwd or Path.cwd()),
                "strict": strict,
            }  # fmt: skip
            self._start()
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            program = Program(self, self._said(), None if terminal else out, err)
            try:
                yield program
            finally:
                program.end()

    def run(self, code, *arguments, **settings):
        """Run a program to its end: its code, and what it said."""
        with self.begin(code, *arguments, **settings) as program:
            out, err = program.communicate()
        return subprocess.CompletedProcess([*arguments], program.returncode, out, err)

    def _start(self):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, __file__], text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            )  # fmt: skip

    def _said(self):
        if not select.select([self.process.stdout], [], [], LIMIT_S)[0]:
            self.stop()
            raise TimeoutError(f"a program still runs after {LIMIT_S} s")
        return int(self.process.stdout.readline())

    def stop(self):
        """End it; the next program starts another."""
        if self.process is not None:
            self.process.kill()
            with self.process:
                pass
            self.process = None


class Program:
    """One that was begun: as far as tests need it, what `subprocess.Popen` is."""

    def __init__(self, starter, pid, out, err):
        self.starter, self.pid, self.err, self.returncode = starter, pid, err, None
        self.stdout = None if out is None else Path(out).open()  # noqa: SIM115

    def communicate(self):
        """What it says until its end; its code is there then."""
        out = "" if self.stdout is None else self.stdout.read()
        self.returncode = self.starter._said()
        return out, "" if self.stdout is None else Path(self.err).read_text()

    def end(self):
        """End it, if it still runs, and all of its session."""
        if self.returncode is None:
            os.killpg(self.pid, 9)
            self.returncode = self.starter._said()
        if self.stdout is not None:
            self.stdout.close()


def next_program():
    """What the fork of this process is to run; this process itself goes on to the next one."""
    for line in sys.stdin:
        program = os.fork()
        if not program:
            os.setsid()
            return json.loads(line)
        say(program)
        code = os.waitstatus_to_exitcode(os.waitpid(program, 0)[1])
        say(code)
    return os._exit(0)


def say(number):
    """To who asked."""
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def become(asked):
    """Take over environment, folder, arguments, and where to write."""
    for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.path[:0] = asked["env"].get("PYTHONPATH", "").split(os.pathsep)
    sys.argv[1:] = asked["arguments"]
    # Python chooses by what is there when it starts
    for name, number in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
        text = open(number, "r" if number == 0 else "w", buffering=1, closefd=False)  # noqa: SIM115
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
    if asked["strict"]:
        warnings.resetwarnings()
        warnings.simplefilter("error")


if __name__ == "__main__":
    import loopkit as lk
    import torch

    # The first optimizer of a process is slow: half a second of imports
    torch.optim.AdamW(torch.nn.Linear(1, 1).parameters())
    lk.Checkpointer, lk.Log, lk.progress  # noqa: B018  # imported when they are asked for
    gc.freeze()  # at a program's end all of this need not be walked through
    become(asked := next_program())
    exec(compile(asked["code"], "<string>", "exec"))  # noqa: S102
else:
    STARTER = Starter()
    atexit.register(STARTER.stop)
