"""How the runs of a sweep stand, told from their folders alone, wherever they run.

A run folder that a sweep has launched holds, beside what training writes there:

- ``.claim``, locked by the sweep while it owns the run, and by the training that inherits the lock: it is
  free only when both have ended, however they ended (of a Slurm job, by its first task);
- ``launch.json``: {pid, started, host, launcher, job_id, identity, exit}, where and how it was launched last;
  of a Slurm job that has not started, the launcher, job_id and identity;
- ``launch.log``: what it printed;
- ``.stop``, while it has been asked to stop.
"""

import dataclasses
import datetime
import enum
import fcntl
import functools
import glob
import json
import os
import subprocess
import time

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import paper, recipe
from ..files import read_json, write_json
from ..preemption import EXIT_CODE
from ..train import LOCK as TRAINING_LOCK
from .plan import Node

__all__ = [
    "CLAIM",
    "LAUNCH",
    "LOG",
    "PLAN",
    "RESULTS",
    "STOP",
    "Progress",
    "State",
    "held",
    "last_error",
    "node_state",
    "planned",
    "progress",
    "queue",
    "recorded_state",
    "remember",
    "table",
    "watch",
]

CLAIM, LAUNCH, LOG, STOP = ".claim", "launch.json", "launch.log", ".stop"
PLAN = "sweep.json"
# What tells that runs without a run.json are done. They are done anew when they or their weights change.
RESULTS = {"evaluate": "results.json", "search": "best.yaml"}
# The end of metrics.json and of logs that is read: some hundred rows.
TAIL = 1 << 16


class State(enum.StrEnum):
    """Of a run: ``interrupted`` has ended without saying so, ``changed`` is another recipe's folder."""

    RUNNING = "running"
    FAILED = "failed"
    CHANGED = "changed"
    INTERRUPTED = "interrupted"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    WAITING = "waiting"


STYLES = {State.FINISHED: "green", State.RUNNING: "bold", State.FAILED: "red", State.CHANGED: "red"}


def held(path):
    """Whether some process holds the lock in a file. Leaves no trace; needs no right to write."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look at the same time do not take each other for the holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def queue():
    """The user's Slurm jobs that have not ended.

    Returns:
        dict[str, str] or None: state, such as ``PENDING``, by job id; None where Slurm does not answer.
    """
    try:
        found = subprocess.run(
            ["squeue", "--noheader", "--me", "--format=%i %T"], capture_output=True, text=True, timeout=60
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    if found.returncode:
        return None
    return dict(line.split() for line in found.stdout.splitlines())


def node_state(out, node, jobs=()):
    """How a run stands.

    Args:
        out (str): the sweep's folder.
        node (Node): of the plan.
        jobs (dict[str, str]): from :func:`queue`; tells what runs where locks do not reach.

    Returns:
        State: never raises for a missing folder.
    """
    folder = os.path.join(out, node.id)
    job = read_json(os.path.join(folder, LAUNCH), {}).get("job_id")
    if dict(jobs).get(job) in ("RUNNING", "COMPLETING"):
        return State.RUNNING
    if held(os.path.join(folder, CLAIM)) or held(os.path.join(folder, TRAINING_LOCK)):
        return State.RUNNING
    return recorded_state(out, node)


def recorded_state(out, node):
    """As :func:`node_state`, for a run that is known not to run."""
    folder = os.path.join(out, node.id)
    launch = read_json(os.path.join(folder, LAUNCH), {})
    record = {}
    if node.kind not in RESULTS:
        record = read_json(os.path.join(folder, "run.json"), {})
        if record and record["identity"] != node.identity:
            return State.CHANGED
        if record.get("state") == "done":
            return State.FINISHED
    elif launch.get("identity") == node.identity and _has_result(folder, node):
        return State.FINISHED
    if launch.get("exit") not in (None, 0, EXIT_CODE):
        return State.FAILED
    if record.get("state") == "running":
        return State.INTERRUPTED
    return State(record.get("state") or (State.PREEMPTED if launch.get("exit") else State.WAITING))


def _has_result(folder, node):
    path = os.path.join(folder, RESULTS[node.kind])
    if node.kind == "search":
        return os.path.exists(path)
    names, iteration = _evaluation(node.config_file, node.options)
    rows = read_json(path, [])
    return bool(names) and set(names) <= {row["dataset"] for row in rows if row["iteration"] == iteration}


@functools.cache
def _evaluation(config_file, options):
    """The data sets of an evaluation, and the iterations that its weights have behind them."""
    cfg = recipe.resolve(recipe.load(config_file, list(options)), 1)
    return cfg.DATASETS.TEST, cfg.SOLVER.MAX_ITER


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a look at a run's folder tells.

    Attributes:
        state: of the run.
        iteration, max_iter: done, and the run's length; both 0 for an evaluation.
        ap: the newest value of the run's metric (0-100).
        rate: iterations per second.
        left: seconds.
        note: the last line of an error, or the Slurm job.
    """

    state: State
    iteration: int
    max_iter: int
    ap: float | None = None
    rate: float | None = None
    left: float | None = None
    note: str = ""


def progress(out, node, jobs=()):
    """Read how far a run is; arguments as of :func:`node_state`.

    Returns:
        Progress: from what the run has written so far.
    """
    folder = os.path.join(out, node.id)
    state = node_state(out, node, jobs)
    trials = glob.glob(os.path.join(glob.escape(folder), "trials", "*"))
    counted = [_metrics(one) for one in (trials if node.kind == "search" else [folder])]
    iteration = sum(done for done, _ in counted)
    seconds = max((each for _, each in counted if each), default=None)
    max_iter = node.start + node.iterations if node.iterations else 0
    iteration = max_iter if state is State.FINISHED else min(max(iteration, node.start), max_iter)
    rows = read_json(os.path.join(folder, "results.json"), [])
    values = [row[node.run.metric] for row in rows if row.get(node.run.metric) is not None]
    rate = left = None
    if state is State.RUNNING and seconds:
        rate, left = 1 / seconds, seconds * (max_iter - iteration)
    return Progress(
        state,
        iteration,
        max_iter,
        ap=values[-1] if values else None,
        rate=rate,
        left=left,
        note="" if state is State.FINISHED else _note(folder, state, dict(jobs)),
    )


def _tail(path):
    """The whole lines at the end of a text file; none where there is no file."""
    try:
        with open(path, "rb") as f:
            f.seek(max(0, os.path.getsize(path) - TAIL))
            return f.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []


def _metrics(folder):
    """The number of iterations done and the seconds that one takes, as metrics.json has them."""
    done, seconds = 0, None
    for line in _tail(os.path.join(folder, "metrics.json")):
        try:
            row = json.loads(line)
        except ValueError:  # cut off, or half written
            continue
        done = max(done, row.get("iteration", -1) + 1)
        seconds = row.get("time", seconds)
    return done, seconds


def last_error(folder):
    """The line that says why a run has failed; "" where nothing does."""
    error = read_json(os.path.join(folder, "run.json"), {}).get("last_error")
    lines = [error] if error else _tail(os.path.join(folder, LOG))
    return next((line.strip() for line in reversed("\n".join(lines).splitlines()) if line.strip()), "")


def _note(folder, state, jobs):
    if state in (State.FAILED, State.INTERRUPTED):
        return last_error(folder)
    job = read_json(os.path.join(folder, LAUNCH), {}).get("job_id")
    return f"Slurm job {job} {jobs[job]}" if job in jobs else ""


def remember(out, nodes):
    """Add nodes to the plan that ``status`` and ``stop`` know, which replaces older ones of the same ids."""
    path = os.path.join(out, PLAN)
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, ".plan.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        known = {values["id"]: values for values in [*read_json(path, []), *map(dataclasses.asdict, nodes)]}
        write_json(path, list(known.values()))


def planned(out):
    """The nodes of all sweeps that ran in a folder, in the order of their plans.

    Raises:
        ValueError: none did.
    """
    known = read_json(os.path.join(out, PLAN))
    if known is None:
        raise ValueError(f"{out} is no sweep's folder (it has no {PLAN}); start one with `run --out {out}`")
    nodes = []
    for values in known:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        nodes.append(Node(**{**values, "run": paper.Run(**values["run"])}))
    return nodes


def table(out):
    """One row per run, the running ones first: state, iteration, AP, speed, time left; last errors below.

    Returns:
        tuple[rich.console.Group, bool]: to print, and whether all runs are finished.
    """
    nodes, jobs = planned(out), queue() or {}
    looks = [(node.id, progress(out, node, jobs)) for node in nodes]
    rows = dict(sorted(looks, key=lambda look: [*State].index(look[1].state)))
    finished = sum(row.state is State.FINISHED for row in rows.values())
    title = f"{finished} of {len(rows)} finished, {time.strftime('%H:%M:%S')}"
    made = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    made.add_column("run", no_wrap=True, min_width=max(map(len, rows)))
    made.add_column("state")
    for name in ("iteration", "AP", "it/s", "left"):
        made.add_column(name, justify="right", no_wrap=True)
    for id, row in rows.items():
        begun = row.max_iter and row.state is not State.WAITING
        made.add_row(
            id,
            Text(row.state.value, STYLES.get(row.state, "")),
            f"{row.iteration:,} / {row.max_iter:,}" if begun else "-",
            "-" if row.ap is None else f"{row.ap:.1f}",
            "-" if row.rate is None else f"{row.rate:.3g}",
            "-" if row.left is None else str(datetime.timedelta(seconds=round(row.left))),
        )
    notes = [Text(f"{id}: {row.note}") for id, row in rows.items() if row.note]
    return Group(made, *notes), finished == len(rows)


def watch(out, console, seconds=5):
    """Show :func:`table` anew every few seconds until all runs are finished, or Ctrl-C."""
    with Live(console=console, auto_refresh=False, screen=False) as live:
        try:
            while True:
                made, finished = table(out)
                live.update(made, refresh=True)
                if finished:
                    return
                time.sleep(seconds)
        except KeyboardInterrupt:
            pass
