"""Trackers of others as sinks: TensorBoard, Weights & Biases, MLflow."""

import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs

from loopkit.errors import MissingExtraError
from loopkit.extras import extra
from loopkit.observe.record import Record
from loopkit.observe.sink import Opening, Sink


def _check_installed(module: str, wrote: str) -> None:
    """Say at once, not at the first record, that a package is missing; without importing it."""
    if find_spec(module) is None:
        raise MissingExtraError(
            wrote, f"that {module} cannot be imported: it is not there", f"pip install {module}"
        )


@attrs.define(eq=False)
class TensorBoard(Sink):
    """Event files for TensorBoard, in the run's folder.

    What a resumed run makes again replaces what was there: TensorBoard drops the events from
    that update on.

    Args:
        path: A folder within the run's folder, or a path of its own.

    Attributes:
        writer: torch's SummaryWriter, for images and the like, once something was logged.

    Raises:
        MissingExtraError: If tensorboard is not installed.

    Example:
        >>> TensorBoard()
        TensorBoard(path='')

    Source: https://docs.pytorch.org/docs/stable/tensorboard.html
    """

    path: str | Path = ""
    writer: Any = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _check_installed("tensorboard", "lk.TensorBoard()")

    def open(self, run: Opening) -> None:
        """Start an event file."""
        module = extra("torch.utils.tensorboard", package="tensorboard", wrote="lk.TensorBoard()")
        self.writer = module.SummaryWriter(str(run.dir / self.path), purge_step=run.kept + 1)
        if run.config:
            rows = [f"| {name} | {value} |" for name, value in run.config.items()]
            text = "\n".join(["| setting | value |", "|---|---|", *rows])
            self.writer.add_text("config", text, max(run.kept, 0))

    def write(self, record: Record) -> None:
        """Add a scalar for each number, a text for each text."""
        for name, number in record.numbers().items():
            self.writer.add_scalar(name, number, record.step, walltime=record.time)
        for name, text in record.texts().items():
            self.writer.add_text(name, text, record.step, walltime=record.time)

    def flush(self) -> None:
        """Write what was added to disk."""
        self.writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self.writer.close()


def _run_id(run: Opening, file: str) -> str | None:
    """The tracker's name for this run, where it goes on."""
    path = run.dir / file
    return path.read_text().strip() if run.resumes and path.exists() else None


@attrs.define(eq=False)
class WandB(Sink):
    """A run of Weights & Biases; its files are in the run's folder, and so is its id.

    A resumed run goes on with the same one. What the client gathers beside the metrics (the
    command line, the host, git, console output, code) stays off, unless you ask for it.

    Args:
        project: The project.
        mode: `"online"`, `"offline"` or `"disabled"`; by default as the client is set.
        name: Of the run; by default that of its folder.
        init: More arguments of `wandb.init`, such as `{"entity": ..., "tags": [...]}`.

    Attributes:
        run: The client's run, once something was logged.

    Raises:
        MissingExtraError: If wandb is not installed.

    Example:
        >>> WandB("digits", mode="offline").project
        'digits'

    Source: https://docs.wandb.ai/ref/python/init
    """

    project: str | None = None
    mode: str | None = attrs.field(default=None, kw_only=True)
    name: str | None = attrs.field(default=None, kw_only=True)
    init: dict[str, Any] = attrs.field(factory=dict, kw_only=True, repr=False)
    run: Any = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        _check_installed("wandb", "lk.WandB()")

    def open(self, run: Opening) -> None:
        """Start the client's run, or go on with it."""
        wandb = extra("wandb", package="wandb", wrote="lk.WandB()")
        quiet = {
            "console": "off",
            "disable_code": True,
            "disable_git": True,
            "save_code": False,
            "x_disable_machine_info": True,
            "x_disable_meta": True,
            "x_disable_stats": True,
            "x_save_requirements": False,
        }
        settings = {k: v for k, v in quiet.items() if k in wandb.Settings.model_fields}
        arguments = {
            "project": self.project,
            "mode": self.mode,
            "name": self.name or run.dir.resolve().name,
            "dir": str(run.dir),
            "config": dict(run.config),
            "id": _run_id(run, "wandb-run-id"),
            "resume": "allow",
            "settings": wandb.Settings(**settings),
        }
        self.run = wandb.init(**{**arguments, **self.init})
        (run.dir / "wandb-run-id").write_text(self.run.id)

    def write(self, record: Record) -> None:
        """Log the values at the record's update."""
        clock = {"epoch": record.epoch, "samples": record.samples}
        self.run.log({**clock, **record.values}, step=record.step)

    def close(self) -> None:
        """Finish the run."""
        self.run.finish()


@attrs.define(eq=False)
class MLflow(Sink):
    """A run of MLflow; its id is in the run's folder, and a resumed run goes on with it.

    Numbers are sent some at a time; what the store has already is not sent again.

    Args:
        experiment: The experiment; made if it is not there.
        uri: Where the store is (`sqlite:///mlflow.db`, a server); by default as MLflow is set.
        name: Of the run; by default that of its folder.

    Attributes:
        client: The `MlflowClient`, and
        run_id: the run, once something was logged.

    Raises:
        MissingExtraError: If mlflow is not installed.

    Example:
        >>> MLflow("digits", uri="sqlite:///mlflow.db").experiment
        'digits'

    Source: https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html
    """

    experiment: str = "Default"
    uri: str | None = attrs.field(default=None, kw_only=True, repr=False)
    name: str | None = attrs.field(default=None, kw_only=True)
    client: Any = attrs.field(default=None, init=False, repr=False)
    run_id: str | None = attrs.field(default=None, init=False)
    _metric: Any = attrs.field(default=None, init=False, repr=False)
    _resumes: bool = attrs.field(default=False, init=False, repr=False)
    _sent: dict[str, int] = attrs.field(factory=dict, init=False, repr=False)
    _metrics: list[Any] = attrs.field(factory=list, init=False, repr=False)
    _sent_at: float = attrs.field(factory=time.monotonic, init=False, repr=False)

    AT_MOST = 100  # numbers that wait to be sent
    LONGEST_S = 10.0  # that the first of them waits

    def __attrs_post_init__(self) -> None:
        _check_installed("mlflow", "lk.MLflow()")

    def open(self, run: Opening) -> None:
        """Make the experiment and the run, or go on with it."""
        mlflow = extra("mlflow", package="mlflow", wrote="lk.MLflow()")
        self.client = mlflow.MlflowClient(tracking_uri=self.uri)
        self._metric = mlflow.entities.Metric
        self.run_id = _run_id(run, "mlflow-run-id")
        self._resumes = self.run_id is not None
        if self.run_id is None:
            found = self.client.get_experiment_by_name(self.experiment)
            experiment = found.experiment_id if found else self._made_experiment()
            name = self.name or run.dir.resolve().name
            # The client's own call: the fluent one would tag the user, the script and git.
            self.run_id = self.client.create_run(experiment, run_name=name).info.run_id
            (run.dir / "mlflow-run-id").write_text(str(self.run_id))
            params = [mlflow.entities.Param(k, str(v)[:6000]) for k, v in run.config.items()]
            self.client.log_batch(self.run_id, params=params)

    def write(self, record: Record) -> None:
        """Take the numbers; text becomes a tag."""
        milliseconds = int(record.time * 1000)
        for name, number in record.numbers().items():
            if record.step > self._last_sent(name):
                self._metrics.append(self._metric(_named(name), number, milliseconds, record.step))
        for name, text in record.texts().items():
            self.client.set_tag(self.run_id, _named(name), text)
        late = time.monotonic() - self._sent_at > self.LONGEST_S
        if late or len(self._metrics) >= self.AT_MOST:
            self.flush()

    def flush(self) -> None:
        """Send what waits."""
        self._sent_at = time.monotonic()
        while self._metrics:
            batch = self._metrics[:1000]  # the most that the store takes at once
            self.client.log_batch(self.run_id, metrics=batch)
            self._metrics = self._metrics[1000:]

    def close(self) -> None:
        """Send what waits, and end the run."""
        self.flush()
        self.client.set_terminated(self.run_id)

    def _made_experiment(self) -> str:
        return str(self.client.create_experiment(self.experiment))

    def _last_sent(self, name: str) -> int:
        """The last update for which the store of a resumed run has this number."""
        if not self._resumes:
            return -1
        if name not in self._sent:
            history = self.client.get_metric_history(self.run_id, _named(name))
            self._sent[name] = max((metric.step for metric in history), default=-1)
        return self._sent[name]


def _named(name: str) -> str:
    """The name, of the characters that the store takes."""
    return "".join(c if c.isalnum() or c in "_-. /:" else "_" for c in name)
