"""Which process of how many this is, as torchrun, SLURM and Open MPI say it."""

import loopkit as lk
import pytest
from hypothesis import given
from hypothesis import strategies as st
from loopkit.parallel.environment import Environment, environment

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
}  # fmt: skip
SLURM = {
    "SLURM_JOB_ID": "20123", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "gpu[003-004,9],other1",
    "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "login1",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
}  # fmt: skip


def test_torchrun():
    """All is said outright."""
    assert environment(TORCHRUN) == Environment(5, 8, 1, "10.0.0.1", 29400)


def test_slurm():
    """The step's first host is where the processes meet, at a port that differs between jobs."""
    assert environment(SLURM) == Environment(5, 8, 1, "gpu003", 15000 + 123)
    assert environment({**SLURM, "SLURM_JOB_ID": "20124"}).port == 15000 + 124
    given = {**SLURM, "MASTER_ADDR": "there", "MASTER_PORT": "7"}
    assert environment(given) == Environment(5, 8, 1, "there", 7)


def test_open_mpi():
    """On one host the processes meet there; on several the user says where."""
    assert environment(OPEN_MPI) == Environment(3, 4, 3, "127.0.0.1", 29500)
    given = OPEN_MPI | {
        "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "MASTER_ADDR": "there"
    }  # fmt: skip
    assert environment(given) == Environment(3, 4, 1, "there", 29500)


def test_torchrun_within_a_job_of_slurm_goes_first():
    """Srun starts torchrun, and torchrun the processes: what it says is nearest."""
    assert environment({**SLURM, **TORCHRUN}) == environment(TORCHRUN)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},  # a shell in a job
        {**SLURM, "SLURM_STEP_NUM_TASKS": "1"},
        {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process(variables):
    """Nobody started several: an allocation, or a launcher with one process, is not a world."""
    assert environment(variables) is None


PARTS = [
    (TORCHRUN, "MASTER_ADDR"), (TORCHRUN, "MASTER_PORT"), (TORCHRUN, "RANK"),
    (TORCHRUN, "WORLD_SIZE"), (SLURM, "SLURM_PROCID"), (SLURM, "SLURM_LOCALID"),
    (OPEN_MPI, "OMPI_COMM_WORLD_RANK"), (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_RANK"),
    (OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "left_out"), PARTS, ids=[name for _, name in PARTS])
def test_variables_that_are_there_in_part_are_an_error(variables, left_out):
    """Each process would train by itself otherwise, in silence; the error names what is lacking."""
    given = {name: value for name, value in variables.items() if name != left_out}
    with pytest.raises(lk.UsageError, match=f"no .*{left_out}"):
        environment(given)


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        (TORCHRUN, "RANK", "8"), (TORCHRUN, "RANK", "-1"), (TORCHRUN, "WORLD_SIZE", "0"),
        (TORCHRUN, "WORLD_SIZE", "eight"), (TORCHRUN, "MASTER_PORT", "0x7"),
        (SLURM, "SLURM_PROCID", "9"), (SLURM, "SLURM_STEP_NUM_TASKS", "2(x4)"),
        (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "x"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_an_error(variables, name, value):
    """A rank outside of the world, or what is no number: the error shows name and value."""
    with pytest.raises(lk.UsageError) as caught:
        environment({**variables, name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


def test_open_mpi_on_several_hosts_needs_an_address():
    """Open MPI does not say where rank 0 is: the error says how to."""
    with pytest.raises(lk.UsageError, match="mpirun -x MASTER_ADDR="):
        environment({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("a1", "a1"), ("a1,b2", "a1"), ("gpu[003-010,12]", "gpu003"), ("gpu[7,9-11],x", "gpu7"),
        ("r[1-2]n[3-4]", "r1n3"), ("node-1.site.org", "node-1.site.org"), ("a[01]-ib", "a01-ib"),
        ("rack[00-02]", "rack00"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_list(hosts, first):
    """Host lists as `scontrol show hostnames` would write them out."""
    assert environment({**SLURM, "SLURM_STEP_NODELIST": hosts}).address == first


@given(st.integers(1, 64), st.data())
def test_what_torch_is_told_reads_back(size, data):
    """The variables of any environment are read as that environment."""
    rank = data.draw(st.integers(0, size - 1))
    made = Environment(rank, size, data.draw(st.integers(0, rank)), "h", data.draw(st.integers(1)))
    assert environment(made.variables()) == made
