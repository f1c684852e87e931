"""Experiment trackers: services that get the metrics of a run, in addition to its own files.

A tracker's package is imported only if a config names it. A run that continues is logged to the run it was before.
"""

import importlib
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax

from dalle2_jax.errors import ConfigError, choose, printable
from dalle2_jax.workdir.folder import EXPERIMENT, StageFolder

PROJECT = "dalle2_jax"
"""The project, unless the environment names another (WANDB_PROJECT, TRACKIO_PROJECT, MLFLOW_EXPERIMENT_NAME)."""


class Tracker(Protocol):
    """A service that stores the metrics of runs."""

    def start(self, name: str, run: str | None, config: Mapping[str, Any]) -> str:
        """Starts a run, or continues one.

        Args:
          name: of the run, for people.
          run: what `start` returned for the run to continue; None starts a new one.
          config: the experiment, as JSON.

        Returns:
          The identifier of the run.
        """
        ...

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Stores the metrics of a step."""
        ...

    def finish(self) -> None:
        """Ends the run."""
        ...


class Wandb:
    """Weights & Biases. ``module`` is the package ``wandb``."""

    def __init__(self, module: Any):
        self._module, self._run = module, None

    def start(self, name: str, run: str | None, config: Mapping[str, Any]) -> str:
        """See `Tracker`."""
        project, run = os.environ.get("WANDB_PROJECT", PROJECT), run or secrets.token_hex(4)
        self._run: Any = self._module.init(project=project, name=name, id=run, resume="allow", config=dict(config))
        self._run.define_metric("*", step_metric="step")  # its own step may not go back when a run continues
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **metrics})

    def finish(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Trackio:
    """Trackio, whose runs are identified by their names. ``module`` is the package ``trackio``."""

    def __init__(self, module: Any):
        self._module = module

    def start(self, name: str, run: str | None, config: Mapping[str, Any]) -> str:
        """See `Tracker`."""
        project, run = os.environ.get("TRACKIO_PROJECT", PROJECT), run or f"{name}-{secrets.token_hex(4)}"
        self._module.init(project=project, name=run, resume="allow", config=dict(config))
        return run

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._module.log(dict(metrics), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._module.finish()


class Mlflow:
    """MLflow, which names a run itself. ``module`` is the package ``mlflow``."""

    def __init__(self, module: Any):
        self._module = module

    def start(self, name: str, run: str | None, config: Mapping[str, Any]) -> str:
        """See `Tracker`."""
        if "MLFLOW_EXPERIMENT_NAME" not in os.environ:
            self._module.set_experiment(PROJECT)
        started = self._module.start_run(run_id=run, run_name=name)
        if run is None:
            self._module.log_dict(dict(config), EXPERIMENT)
        return started.info.run_id

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._module.log_metrics(dict(metrics), step=step)

    def finish(self) -> None:
        """See `Tracker`."""
        self._module.end_run()


TRACKERS: Mapping[str, Callable[[Any], Tracker]] = {"wandb": Wandb, "trackio": Trackio, "mlflow": Mlflow}
"""Trackers by the name of their package."""


def make_tracker(name: str) -> Tracker | None:
    """Returns the tracker of a name; None for "".

    Raises:
      ConfigError: its package is not installed.
      UsageError: there is no such tracker.
    """
    if not name:
        return None
    tracker = choose("tracker", name, TRACKERS)
    try:
        return tracker(importlib.import_module(name))
    except ImportError as error:
        raise ConfigError(
            f"config.tracker {name!r} needs the package {name}, which cannot be imported ({error}): pip install {name}",
            "tracker",
        ) from error


class Tracking:
    """Sends the metrics of a run to a tracker. A context manager.

    Training does not depend on the tracker: after its first exception there is one warning, and it is not called again.
    Only process 0 sends. The run's identifier is stored in ``run.json``.

    Args:
      tracker: None for no tracker.
      folder: of the stage.
      warn: called with the warning.
    """

    def __init__(self, tracker: Tracker | None, folder: StageFolder, warn: Callable[[str], None]):
        self._tracker = tracker if jax.process_index() == 0 else None
        self._folder, self._warn = folder, warn

    def __enter__(self) -> "Tracking":
        self._call(self._start)
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends the metrics of a step."""
        self._call(lambda tracker: tracker.log(step, metrics))

    def __exit__(self, *_: object) -> None:
        self._call(lambda tracker: tracker.finish())

    def _start(self, tracker: Tracker) -> None:
        folder, kind = self._folder, type(tracker).__name__
        stored = folder.read_json("run.json") or {}
        runs = stored["trackers"] if "trackers" in stored else {}
        name, config = f"{folder.root.resolve().name}/{folder.stage}", folder.read_json(EXPERIMENT) or {}
        run = tracker.start(name, runs[kind] if kind in runs else None, config)
        folder.write_json("run.json", {**stored, "trackers": {**runs, kind: run}})

    def _call(self, action: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            action(self._tracker)
        except Exception as error:  # noqa: BLE001  trackers raise types of their own
            name, self._tracker = type(self._tracker).__name__, None
            reason = f"{type(error).__name__}: {printable(error)[:200]}"
            self._warn(f"tracker {name} failed and gets no more metrics ({reason}); training continues without it")
