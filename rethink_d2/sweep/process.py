"""One run as a process: its claim, its start, its end, and how it is asked to stop."""

import contextlib
import dataclasses
import fcntl
import os
import signal
import socket
import subprocess

from ..engine.checkpoint import checkpoints
from ..files import write_json
from ..preemption import EXIT_CODE
from .plan import identity
from .records import read
from .state import CLAIM, LAUNCH, LOG, RESULTS, STOP, held, queue

__all__ = [
    "RETRIES",
    "STOPPED",
    "catch_signals",
    "curable",
    "current",
    "ended",
    "forget_stop",
    "hold_back",
    "lock",
    "reached",
    "start",
    "stop",
]

# More starts of a run that has crashed; it resumes. Counted anew from each new checkpoint on.
RETRIES = 2
REFUSED = 2
# What comes back in the same way, since a run is a function of its config and seed.
INCURABLE = ("Diverged", "OutOfMemoryError")
# A process that has not come to its signal handlers yet ends by the signal itself.
STOPPED = (EXIT_CODE, -signal.SIGTERM, -signal.SIGUSR1, -signal.SIGUSR2, -signal.SIGINT)


@contextlib.contextmanager
def catch_signals(act=lambda: None):
    """While active, collect SIGTERM and SIGINT instead of ending by them.

    Args:
        act (callable): called after each.

    Yields:
        list[int]: the signals that have come so far.
    """
    caught = []

    def handle(number, frame):
        caught.append(number)
        act()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def lock(path):
    """Take the lock in a file, without waiting.

    Args:
        path (str): the file; made if needed, and never removed.

    Returns:
        int or None: a file descriptor that holds it as long as it, or one inherited from it, is open.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def started(pid):
    """When a process of this machine started, in the system's ticks; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return int(f.read().rpartition(")")[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):
        return None


def current(node, processes):
    """A node with the identity that it has now; that of weights which a parent makes is not known before."""
    if "MODEL.WEIGHTS" not in node.options:
        return node
    return dataclasses.replace(node, identity=identity(node, processes))


def start(folder, node, argv, launcher, *, fds=(), env=None, cores=None, session=True, job_id=None):
    """Start a run's process, with its output in launch.log, and say so in launch.json.

    Args:
        folder (str): the run's.
        node (Node): the run, with the identity that it has now.
        argv (list[str]): its command.
        launcher (str): "local" or "slurm".
        fds (iterable[int]): locks that it inherits.
        env (dict), cores (set): what it gets besides; None for everything.
        session (bool): whether it leads a session of its own, out of reach of the terminal's Ctrl-C.
        job_id (str): of Slurm.

    Returns:
        subprocess.Popen: the process.
    """
    forget_stop(folder)
    before = read(os.path.join(folder, LAUNCH), {}).get("identity")
    if node.kind in RESULTS and before != node.identity:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, RESULTS[node.kind]))
    with open(os.path.join(folder, LOG), "ab") as log:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **(env or {})},
            pass_fds=fds,
            start_new_session=session,
            preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
        )
    launch = {"pid": process.pid, "started": started(process.pid), "host": socket.gethostname()}
    launch |= {"launcher": launcher, "job_id": job_id, "identity": node.identity, "exit": None}
    write_json(os.path.join(folder, LAUNCH), launch)
    return process


def forget_stop(folder):
    """Let a run that was asked to stop run again."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(folder, STOP))


def ended(folder, code):
    """Note a run's exit code in launch.json."""
    path = os.path.join(folder, LAUNCH)
    write_json(path, {**read(path, {}), "exit": code})


def reached(folder):
    """The last iteration that a run's checkpoints contain; -1 for none."""
    return max(checkpoints(folder), default=-1)


def curable(folder, code):
    """Whether starting a failed run again may help: not after a refusal, or where it would fail again."""
    error = read(os.path.join(folder, "run.json"), {}).get("last_error") or ""
    return code != REFUSED and not error.startswith(INCURABLE)


def stop(out, id):
    """Ask a running run to write a checkpoint and end; a later sweep goes on with it.

    Args:
        out (str): the sweep's folder.
        id (str): of a node.

    Returns:
        str: what was done.

    Raises:
        ValueError: it does not run, or not where this process can reach it.
    """
    folder = os.path.join(out, id)
    launch = read(os.path.join(folder, LAUNCH), {})
    job, pid = launch.get("job_id"), launch.get("pid")
    if job:
        state = (queue() or {}).get(job)
        if state is None:
            raise ValueError(f"{id} does not run: Slurm job {job} has ended")
        hold_back(folder)
        waits = state in ("PENDING", "REQUEUED")
        subprocess.run(["scancel", *([] if waits else ["--signal=TERM"]), job], check=True)
        return f"{id}: Slurm job {job} was asked to stop"
    if not held(os.path.join(folder, CLAIM)) or pid is None:
        raise ValueError(f"{id} does not run, or no sweep has started it")
    if launch["host"] != socket.gethostname():
        raise ValueError(f"{id} runs on {launch['host']}: stop it there")
    if started(pid) != launch["started"]:
        raise ValueError(f"{id} does not run any more")
    hold_back(folder)
    os.kill(pid, signal.SIGTERM)
    return f"{id}: process {pid} was asked to stop"


def hold_back(folder):
    """Let no sweep that is under way start a run, or start it again; the next one does."""
    os.makedirs(folder, exist_ok=True)
    open(os.path.join(folder, STOP), "w").close()
