"""Two hosts, of which the link between them is cut: both end with an error, and a restart goes on.

The hosts are two network namespaces of this machine, joined by a pair of virtual devices.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_failures import SLOW

SCRIPT = Path(__file__).parent / "hosted.py"
TIMEOUT_S, UPDATES = 10, 60
ADDRESSES = ("10.231.77.1", "10.231.77.2")
MOST_S = TIMEOUT_S + 40


def ip(*words):
    """One command of iproute2."""
    return subprocess.run(
        ["ip", *words], check=True, capture_output=True, text=True, timeout=20
    ).stdout


@contextmanager
def two_hosts():
    """Names of two namespaces that reach each other, and nothing else."""
    names = [f"loopkit-{os.getpid()}-{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
            # torchrun's agent waits as long as TCP does: 15 minutes, as Linux has it by default
            ip("netns", "exec", name, "sysctl", "-qw", "net.ipv4.tcp_retries2=6")
        ip("-n", names[0], "link", "add", "wire", "type", "veth", "peer", "wire", "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            ip("-n", name, "link", "set", "wire", "up")
        yield names
    finally:
        for name in names:
            for left in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            ).stdout.split():
                os.kill(int(left), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


@pytest.fixture
def hosts():
    """Two hosts, where this process may make them."""
    if shutil.which("ip") is None:
        pytest.skip("no iproute2")
    try:
        with two_hosts():
            pass
    except (subprocess.CalledProcessError, OSError) as error:
        pytest.skip(f"no right to make network namespaces: {getattr(error, 'stderr', error)}")
    with two_hosts() as names:
        yield names


class Agents:
    """A torchrun on each host."""

    def __init__(self, hosts, folder, port):
        self.logs = [folder.parent / f"{port}-{host}.log" for host in hosts]
        self.processes = [self._start(i, host, folder, port) for i, host in enumerate(hosts)]

    def _start(self, index, host, folder, port):
        command = [
            "ip", "netns", "exec", host, sys.executable, "-W", "ignore",
            "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={ADDRESSES[0]}:{port}", f"--rdzv-id={port}",
            f"--rdzv-conf=is_host={int(index == 0)},read_timeout=10,join_timeout=60",
            f"--local-addr={ADDRESSES[index]}", "--monitor-interval=0.2",
            str(SCRIPT), str(folder), str(UPDATES), str(TIMEOUT_S),
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "wire"}
        with self.logs[index].open("w") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def said(self, index):
        return self.logs[index].read_text()

    def wait_for(self, pattern, seconds):
        """Until both have said it."""
        until = time.monotonic() + seconds
        while not all(re.search(pattern, self.said(i)) for i in range(2)):
            assert time.monotonic() < until, [self.said(i)[-3000:] for i in range(2)]
            assert all(p.poll() is None for p in self.processes), self.said(0)[-3000:]
            time.sleep(0.1)

    def wait(self, seconds):
        """Until both have ended; the seconds that each took."""
        began, took = time.monotonic(), [None, None]
        while None in took:
            for i, process in enumerate(self.processes):
                if took[i] is None and process.poll() is not None:
                    took[i] = time.monotonic() - began
            late = time.monotonic() > began + seconds
            assert not late, [took, *(self.said(i)[-3000:] for i in range(2))]
            time.sleep(0.1)
        return took

    def stop(self):
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, 9)
            process.wait()


@pytest.mark.timeout(280)
def test_a_link_that_is_cut_ends_both_hosts_and_a_restart_goes_on(hosts, tmp_path, record_property):
    """Each side says what it lost; the restart resumes at one step, and comes to the end."""
    folder = tmp_path / "checkpoints"
    agents = Agents(hosts, folder, 29411)
    try:
        # Step 10 is saved after its line is printed: by step 15 its write is under way
        agents.wait_for(r"at step 1[5-9]\b", 60 * SLOW)
        ip("-n", hosts[0], "link", "set", "wire", "down")
        took = agents.wait(MOST_S * SLOW)
    finally:
        agents.stop()
    record_property("seconds", f"{max(took):.1f}")
    record_property("outcome", f"the hosts ended {took[0]:.1f} s and {took[1]:.1f} s after the cut")
    assert all(process.returncode != 0 for process in agents.processes)
    assert re.search(r"rank 0 says: .* on rank 0 of 2: found no answer from rank 1", agents.said(0))
    # On the other side the agent may lose its peer before the rank does
    lost = r"rank 1 says: .* on rank 1 of 2: found|connection to the C10d store has failed"
    assert re.search(lost, agents.said(1)), agents.said(1)[-3000:]
    ip("-n", hosts[0], "link", "set", "wire", "up")
    again = Agents(hosts, folder, 29412)
    try:
        again.wait(60 * SLOW)
    finally:
        again.stop()
    restored = [re.search(r"restored step (\d+)", again.said(i))[1] for i in range(2)]
    assert restored[0] == restored[1]
    assert int(restored[0]) >= 10
    ends = {re.search(r"ended with .*", again.said(i))[0] for i in range(2)}
    assert len(ends) == 1
    assert ends.pop().endswith(f"at step {UPDATES}")
