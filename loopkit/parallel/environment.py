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
        UsageError: Where the variables are there only in part.

    Example:
        >>> environment({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
        ...              "SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "gpu[03-04]"}).address
        'gpu03'
    """
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return _of_torchrun(variables)
    if int(variables.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return _of_slurm(variables)
    if int(variables.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return _of_open_mpi(variables)
    return None


def _of_torchrun(found: Mapping[str, str]) -> Environment:
    if "MASTER_ADDR" not in found or "MASTER_PORT" not in found:
        raise UsageError(
            "RANK and WORLD_SIZE in the environment",
            "no MASTER_ADDR and MASTER_PORT, where the processes meet",
            "torchrun script.py, which sets all of them",
        )
    rank, size = int(found["RANK"]), int(found["WORLD_SIZE"])
    local = int(found.get("LOCAL_RANK", 0))
    return Environment(rank, size, local, found["MASTER_ADDR"], int(found["MASTER_PORT"]))


def _of_slurm(found: Mapping[str, str]) -> Environment:
    hosts = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_JOB_NODELIST", "localhost")
    return Environment(
        int(found["SLURM_PROCID"]),
        int(found["SLURM_STEP_NUM_TASKS"]),
        int(found["SLURM_LOCALID"]),
        found.get("MASTER_ADDR", _first_host(hosts)),
        int(found.get("MASTER_PORT", 15000 + int(found.get("SLURM_JOB_ID", 0)) % 20000)),
    )


def _first_host(hosts: str) -> str:
    """The first of a SLURM list: `a1`, `a1,b2`, `gpu[003-010,12]`, `r[1-2]n[3-4]`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else hosts


def _of_open_mpi(found: Mapping[str, str]) -> Environment:
    size, local = int(found["OMPI_COMM_WORLD_SIZE"]), int(found["OMPI_COMM_WORLD_LOCAL_SIZE"])
    if "MASTER_ADDR" not in found and local < size:
        raise UsageError(
            f"mpirun with {size} processes, {local} of them on this host",
            "no MASTER_ADDR, and mpirun does not say where the first process is",
            "mpirun -x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500 ...",
        )
    return Environment(
        int(found["OMPI_COMM_WORLD_RANK"]),
        size,
        int(found["OMPI_COMM_WORLD_LOCAL_RANK"]),
        found.get("MASTER_ADDR", "127.0.0.1"),
        int(found.get("MASTER_PORT", 29500)),
    )
