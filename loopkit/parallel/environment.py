"""Which process of how many this is, as its launcher says."""

import os
import re
from collections.abc import Mapping

import attrs

from loopkit.errors import UsageError


@attrs.frozen
class Environment:
    """One process among those that a launcher has started.

    Attributes:
        rank: Its number among all.
        world_size: How many there are.
        local_rank: Its number on this host.
        address: Host of the first process, where the others meet.
        port: Port there.
    """

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int

    def variables(self) -> dict[str, str]:
        """As torch's `env://` takes it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
        }


def environment(variables: Mapping[str, str] = os.environ) -> Environment | None:
    """What torchrun, SLURM (`srun`) or Open MPI (`mpirun`) say; None where nobody started several.

    Raises:
        UsageError: Where the variables are there only in part, or are numbers that cannot be.

    Example:
        >>> environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        ...              "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-04]"}).address
        'gpu03'
    """
    torchrun, slurm, open_mpi = (Said(variables, launcher) for launcher in LAUNCHERS)
    if "RANK" in variables or "WORLD_SIZE" in variables:
        return _of_torchrun(torchrun)
    if "SLURM_STEP_NUM_TASKS" in variables and slurm.number("SLURM_STEP_NUM_TASKS", least=1) > 1:
        return _of_slurm(slurm)
    if "OMPI_COMM_WORLD_SIZE" in variables and open_mpi.number("OMPI_COMM_WORLD_SIZE", least=1) > 1:
        return _of_open_mpi(open_mpi)
    return None


LAUNCHERS = {
    "torchrun": "torchrun script.py, which sets them all, or python script.py without any of them",
    "srun": "srun python script.py, which sets them all",
    "mpirun": "mpirun python script.py, which sets them all",
}


@attrs.frozen
class Said:
    """What a launcher says, read with care: processes that misread it would each train alone."""

    variables: Mapping[str, str]
    launcher: str

    def text(self, name: str) -> str:
        """A variable that has to be there."""
        if not self.variables.get(name):
            raise UsageError(
                f"an environment as of {self.launcher}",
                f"no {name} beside {sorted(_akin(self.variables, name))}",
                LAUNCHERS[self.launcher],
            )
        return self.variables[name]

    def number(self, name: str, *, least: int = 0, below: int | None = None) -> int:
        """A whole number that has to be there."""
        text = self.text(name)
        value = int(text) if re.fullmatch(r"-?[0-9]+", text) else least - 1
        if value < least or (below is not None and value >= below):
            limits = f"{least} or more" if below is None else f"{least} to {below - 1}"
            raise UsageError(
                f"an environment as of {self.launcher}",
                f"{name} = {text!r}",
                f"{name}: a whole number, {limits}; {LAUNCHERS[self.launcher]}",
            )
        return value

    def given(self, name: str, default: int) -> int:
        """A number that may be there."""
        return self.number(name) if name in self.variables else default


def _akin(variables: Mapping[str, str], name: str) -> list[str]:
    """The variables that the same launcher sets."""
    start = {"SLURM": "SLURM_", "OMPI": "OMPI_COMM_WORLD_"}.get(name.split("_", maxsplit=1)[0])
    torchrun = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return [v for v in variables if (v.startswith(start) if start else v in torchrun)][:8]


def _of_torchrun(said: Said) -> Environment:
    size = said.number("WORLD_SIZE", least=1)
    return Environment(
        said.number("RANK", below=size),
        size,
        said.given("LOCAL_RANK", 0),
        said.text("MASTER_ADDR"),
        said.number("MASTER_PORT"),
    )


def _of_slurm(said: Said) -> Environment:
    found, size = said.variables, said.number("SLURM_STEP_NUM_TASKS")
    hosts = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST", "localhost")
    return Environment(
        said.number("SLURM_PROCID", below=size),
        size,
        said.number("SLURM_LOCALID", below=size),
        found.get("MASTER_ADDR", _first_host(hosts)),
        said.given("MASTER_PORT", 15000 + said.given("SLURM_JOB_ID", 0) % 20000),
    )


def _first_host(hosts: str) -> str:
    """The first of a SLURM list: `a1`, `a1,b2`, `gpu[003-010,12]`, `r[1-2]n[3-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else hosts


def _of_open_mpi(said: Said) -> Environment:
    found, size = said.variables, said.number("OMPI_COMM_WORLD_SIZE")
    local = said.number("OMPI_COMM_WORLD_LOCAL_SIZE", least=1)
    if "MASTER_ADDR" not in found and local < size:
        raise UsageError(
            f"mpirun with {size} processes, {local} of them on this host",
            "no MASTER_ADDR, and mpirun does not say where the first process is",
            "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ...",
        )
    return Environment(
        said.number("OMPI_COMM_WORLD_RANK", below=size),
        size,
        said.number("OMPI_COMM_WORLD_LOCAL_RANK", below=local),
        found.get("MASTER_ADDR", "127.0.0.1"),
        said.given("MASTER_PORT", 29500),
    )
