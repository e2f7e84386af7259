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
import signal
import subprocess
import time

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .. import model_zoo, paper, recipe
from ..files import write_json
from ..preemption import EXIT_CODE
from ..train import LOCK as TRAINING_LOCK
from .plan import Node
from .records import read, run_record

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
    """Of a run: ``interrupted`` has ended without saying so, ``changed`` is another recipe's folder.

    ``unreadable`` is none that runs are in: a file that tells the state is damaged.
    """

    RUNNING = "running"
    FAILED = "failed"
    CHANGED = "changed"
    UNREADABLE = "unreadable"
    INTERRUPTED = "interrupted"
    PREEMPTED = "preempted"
    FINISHED = "finished"
    WAITING = "waiting"


STYLES = {State.FINISHED: "green", State.RUNNING: "bold"}
STYLES |= dict.fromkeys((State.FAILED, State.CHANGED, State.UNREADABLE), "red")


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

    Raises:
        ValueError: a file in it is damaged; names it.
    """
    folder = os.path.join(out, node.id)
    job = read(os.path.join(folder, LAUNCH), {}).get("job_id")
    if dict(jobs).get(job) in ("RUNNING", "COMPLETING"):
        return State.RUNNING
    if held(os.path.join(folder, CLAIM)) or held(os.path.join(folder, TRAINING_LOCK)):
        return State.RUNNING
    return recorded_state(out, node)


def recorded_state(out, node):
    """As :func:`node_state`, for a run that is known not to run."""
    folder = os.path.join(out, node.id)
    launch = read(os.path.join(folder, LAUNCH), {})
    record = {}
    if node.kind not in RESULTS:
        record = run_record(folder)
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
    rows = read(path, [])
    return bool(names) and set(names) <= {r.get("dataset") for r in rows if r.get("iteration") == iteration}


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
        iteration, max_iter: done, with those of the trunk, and the run's length; both 0 for an evaluation.
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

    Raises:
        ValueError: as :func:`node_state`.
    """
    folder = os.path.join(out, node.id)
    state = node_state(out, node, jobs)
    trials = glob.glob(os.path.join(glob.escape(folder), "trials", "*"))
    counted = [_metrics(one) for one in (trials if node.kind == "search" else [folder])]
    iteration = sum(done for done, _ in counted)
    seconds = max((each for _, each in counted if each), default=None)
    max_iter = node.start + node.iterations if node.iterations else 0
    begun = node.start if os.path.exists(os.path.join(folder, "run.json")) else 0
    iteration = max_iter if state is State.FINISHED else min(max(iteration, begun), max_iter)
    rows = read(os.path.join(folder, "results.json"), [])
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
        if isinstance(row, dict):
            done = max(done, row.get("iteration", -1) + 1)
            seconds = row.get("time", seconds)
    return done, seconds


def last_error(folder):
    """The line that says why a run has failed; "" where nothing does."""
    error = read(os.path.join(folder, "run.json"), {}).get("last_error")
    code = read(os.path.join(folder, LAUNCH), {}).get("exit") or 0
    if code < 0 and not error:
        guess = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{guess}"
    lines = [error] if error else _tail(os.path.join(folder, LOG))
    return next((line.strip() for line in reversed("\n".join(lines).splitlines()) if line.strip()), "")


def _note(folder, state, jobs):
    if state in (State.FAILED, State.INTERRUPTED):
        return last_error(folder)
    job = read(os.path.join(folder, LAUNCH), {}).get("job_id")
    return f"Slurm job {job} {jobs[job]}" if job in jobs else ""


def remember(out, nodes):
    """Add nodes to the plan that ``status`` and ``stop`` know, which replaces older ones of the same ids.

    Raises:
        ValueError: that plan is damaged.
    """
    path = os.path.join(out, PLAN)
    os.makedirs(out, exist_ok=True)
    configs = f"{model_zoo.config_dir()}{os.sep}"
    # By name, because others may look with an installation of their own.
    new = [{**dataclasses.asdict(n), "config_file": n.config_file.removeprefix(configs)} for n in nodes]
    with open(os.path.join(out, ".plan.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        write_json(path, list({values.get("id"): values for values in [*read(path, []), *new]}.values()))


def planned(out):
    """The nodes of all sweeps that ran in a folder, in the order of their plans.

    Raises:
        ValueError: none did, or another version's.
    """
    path = os.path.join(out, PLAN)
    known = read(path, [])
    if not known:
        raise ValueError(f"{out} is no sweep's folder (it has no {PLAN}); start one with `run --out {out}`")
    try:
        return [_node(**values) for values in known]
    except TypeError as e:
        raise ValueError(
            f"{path} cannot be read: it is another version's ({e}); move it away, `run` makes a new one"
        ) from e


def _node(run, config_file, **values):
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    file = config_file and os.path.join(model_zoo.config_dir(), config_file)
    return Node(run=paper.Run(**run), config_file=file, **values)


def table(out):
    """One row per run, the running ones first: state, iteration, AP, speed, time left; last errors below.

    Returns:
        tuple[rich.console.Group, bool]: to print, and whether all runs are finished.
    """
    nodes, jobs = planned(out), queue() or {}
    looks = [(node.id, _look(out, node, jobs)) for node in nodes]
    rows = dict(sorted(looks, key=lambda look: [*State].index(look[1].state)))
    finished = sum(row.state is State.FINISHED for row in rows.values())
    title = f"{finished} of {len(rows)} finished, {time.strftime('%H:%M:%S')}"
    made = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    made.add_column("run", overflow="fold")  # the only one that a narrow terminal makes narrower
    made.add_column("state", no_wrap=True)
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


def _look(out, node, jobs):
    """As :func:`progress`; says what is damaged instead of raising it."""
    try:
        return progress(out, node, jobs)
    except ValueError as e:
        return Progress(State.UNREADABLE, 0, 0, note=str(e))


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
