"""Run a plan on this machine: each run a process of its own, as soon as its parents are done.

Two locks make sure that nothing runs twice and no GPU is used twice, by any number of sweeps on one folder:
a run's ``.claim`` and a device's file below ``.devices``. The training inherits both from the sweep that
starts it: they stay locked while it runs, also when the sweep has been killed, and are free when both have
ended.
"""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time

import torch

from ..preemption import EXIT_CODE
from . import plan
from .process import (
    RETRIES,
    STOPPED,
    catch_signals,
    curable,
    current,
    ended,
    forget_stop,
    lock,
    reached,
    start,
)
from .state import (
    CLAIM,
    LOG,
    STOP,
    TRAINING_LOCK,
    State,
    held,
    last_error,
    node_state,
    recorded_state,
    remember,
)

__all__ = ["LocalSweep", "say", "summary", "write_report"]


def slots(num_gpus, parallel=None):
    """The parts of this machine that hold one run each.

    Args:
        num_gpus (int): of one run; without GPUs, its processes.
        parallel (int or None): at most so many; None for as many as there are GPUs for, or one on a CPU.

    Returns:
        list[tuple[list[str], dict, set or None]]: names of the devices, environment, cores. Runs side by side
        on a CPU get cores of their own, as a run's last bits depend on its number of threads.
    """
    if torch.cuda.is_available():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        ids = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
        parts = [ids[i : i + num_gpus] for i in range(0, len(ids) - num_gpus + 1, num_gpus)]
        return [(part, {"CUDA_VISIBLE_DEVICES": ",".join(part)}, None) for part in parts[:parallel]]
    cores, parallel = sorted(os.sched_getaffinity(0)), parallel or 1
    share = [set(cores[i::parallel]) or set(cores) for i in range(parallel)]
    return [([f"cpu{i}"], {}, share[i] if parallel > 1 else None) for i in range(parallel)]


@dataclasses.dataclass
class Child:
    """A running process of this sweep.

    Attributes:
        attempt: how often its run has been started again since it last reached a new checkpoint.
        reached: the iteration of its checkpoint when it was started.
    """

    node: plan.Node
    process: subprocess.Popen
    slot: tuple
    fds: list
    attempt: int
    reached: int


class LocalSweep:
    """Walks a plan on this machine.

    Args:
        out (str): the folder of all run folders.
        nodes (list[Node]): parents before what depends on them.
        num_gpus (int), parallel (int or None): see :func:`slots`.
        command (callable): ``command(node, num_gpus, out)`` returns a node's argv.
        poll (float): seconds between two looks.
    """

    def __init__(self, out, nodes, *, num_gpus=1, parallel=None, command=plan.command, poll=0.5):
        self.out, self.nodes = out, {node.id: node for node in nodes}
        self.outcome = {}  # by id, of the decided ones: a State, or why it did not run
        self._num_gpus, self._command, self._poll = num_gpus, command, poll
        self._slots, self._children = slots(num_gpus, parallel), []
        if not self._slots:
            raise ValueError(f"--num-gpus {num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
        self._settled, self._elsewhere, self._signals = set(), set(), []

    def run(self):
        """Run what is not finished, and return when nothing can go on.

        Returns:
            dict[str, State or str]: by id. A text says why the run was not started. What has no entry was
            left because of a signal (SIGTERM, SIGINT), which ends the running ones in order; a second kills.
        """
        remember(self.out, self.nodes.values())
        for node in self.nodes.values():
            if node_state(self.out, node) is not State.RUNNING:
                forget_stop(self._folder(node))
        with catch_signals(self._pass_on) as self._signals:
            while True:
                self._reap()
                if not self._signals:
                    busy = {*self.outcome, *(child.node.id for child in self._children)}
                    for node in [n for n in self.nodes.values() if n.id not in busy]:
                        self._advance(node)
                if not self._children and (self._signals or len(self.outcome) == len(self.nodes)):
                    return self.outcome
                time.sleep(self._poll)

    def _pass_on(self):
        for child in self._children:
            if child.process.poll() is None:
                if len(self._signals) > 1:
                    os.killpg(child.process.pid, signal.SIGKILL)
                else:
                    child.process.terminate()

    def _folder(self, node):
        return os.path.join(self.out, node.id)

    def _advance(self, node):
        """Decide a node, or start it, or leave it for the next look."""
        known = [self.outcome.get(parent) for parent in node.parents]
        for parent, outcome in zip(node.parents, known, strict=True):
            if outcome not in (None, State.FINISHED):
                # It may have finished before, with a parent of another plan.
                finished = recorded_state(self.out, current(node, self._num_gpus)) is State.FINISHED
                self.outcome[node.id] = State.FINISHED if finished else f"needs {parent}"
                return
        if None in known:
            return
        if node.id not in self._settled:
            self._settled.add(node.id)
            node = self.nodes[node.id] = current(node, self._num_gpus)
            remember(self.out, [node])
        state = node_state(self.out, node)
        if state is State.RUNNING:
            if node.id not in self._elsewhere:
                say(node.id, "runs already: waiting for it")
            self._elsewhere.add(node.id)
        elif state in (State.FINISHED, State.CHANGED):
            self._decide(node, state)
        elif os.path.exists(os.path.join(self._folder(node), STOP)):
            self._decide(node, State.PREEMPTED)
        else:
            self._claim(node)

    def _claim(self, node):
        slot, devices = self._free_slot()
        if slot is None:
            return
        claim = lock(os.path.join(self._folder(node), CLAIM))
        fds = [*devices, claim]
        # Only under the claim is it certain that no other sweep has just run it.
        lost = claim is None or held(os.path.join(self._folder(node), TRAINING_LOCK))
        if lost or recorded_state(self.out, node) is State.FINISHED:
            _close(fds)
            return
        self._start(node, slot, fds, attempt=0)

    def _free_slot(self):
        """A slot with the locks of all its devices, or None twice."""
        for slot in self._slots:
            names = [f"{socket.gethostname()}-{device}" for device in slot[0]]
            fds = [lock(os.path.join(self.out, ".devices", name)) for name in names]
            if None not in fds:
                return slot, fds
            _close(fds)
        return None, None

    def _start(self, node, slot, fds, attempt):
        _, env, cores = slot
        argv = self._command(node, self._num_gpus, self.out)
        before = reached(self._folder(node))
        process = start(self._folder(node), node, argv, "local", fds=fds, env=env, cores=cores)
        self._children.append(Child(node, process, slot, fds, attempt, before))
        if self._signals:  # one has come before the handler knew of this child
            process.terminate()
        say(node.id, "started" if attempt == 0 else f"started again ({attempt} of {RETRIES})")

    def _reap(self):
        for child in [c for c in self._children if c.process.poll() is not None]:
            self._children.remove(child)
            if not self._ended(child):
                _close(child.fds)

    def _ended(self, child):
        """Judge a process that has ended; returns whether it was started again."""
        node, code, folder = child.node, child.process.returncode, self._folder(child.node)
        ended(folder, code)
        attempt = 0 if reached(folder) > child.reached else child.attempt
        if code == 0 and recorded_state(self.out, node) is State.FINISHED:
            self._decide(node, State.FINISHED)
        elif code in STOPPED or (self._signals and code < 0):
            self._decide(node, State.PREEMPTED)
        elif not self._signals and attempt < RETRIES and curable(folder, code):
            say(node.id, f"ended with {code}: {last_error(folder)}")
            self._start(node, child.slot, child.fds, attempt + 1)
            return True
        else:
            self._decide(node, State.FAILED)
        return False

    def _decide(self, node, state):
        self.outcome[node.id] = state
        say(node.id, state.value)


def _close(handles):
    for handle in handles:
        if handle is not None:
            os.close(handle)


def say(id, text):
    """Report an event of a run."""
    print(f"{time.strftime('%H:%M:%S')}  {id}  {text}", flush=True)


def summary(out, nodes, outcome):
    """Say what a sweep has left undone.

    Args:
        out (str): its folder.
        nodes (iterable[Node]): of its plan.
        outcome (dict[str, State or str]): by id, as :meth:`LocalSweep.run` returns it.

    Returns:
        tuple[str, int]: lines, and the exit code: 0; 1 after a failure, or where settings have changed; 75
        where only going on is left.
    """
    missing = {n.id: outcome.get(n.id, "not started") for n in nodes if outcome.get(n.id) != State.FINISHED}
    if not missing:
        return f"All {len(outcome)} runs are finished.", 0
    lines = [f"{len(missing)} of {len(list(nodes))} runs are missing:"]
    for id, why in missing.items():
        if why is State.FAILED:
            folder = os.path.join(out, id)
            why = f"failed: {last_error(folder)} ({os.path.join(folder, LOG)})"
        lines.append(f"  {id}  {why.value if isinstance(why, State) else why}")
    lines.append("The same command goes on with them.")
    bad = {State.FAILED, State.CHANGED} & set(outcome.values())
    return "\n".join(lines), 1 if bad else EXIT_CODE


def write_report(out):
    """Make the report of a sweep; returns its exit code."""
    return subprocess.run([sys.executable, "-m", "rethink_d2.report", out]).returncode
