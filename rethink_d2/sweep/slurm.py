"""Run a plan on a Slurm cluster: every run is one job, submitted by submitit.

A job waits for the jobs of its parents by ``afterany`` and looks itself whether they are done, since a job
that is queued again ends more than once. Before its time limit, and when it is preempted, the training writes
a checkpoint; then the job goes back to the queue, and on from there. How runs stand is read from their
folders and from squeue, which need no accounting daemon.
"""

import contextlib
import os
import subprocess
import time
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError

from ..files import write_json
from . import plan, sbatch
from .launch import say
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
from .records import read
from .state import (
    CLAIM,
    LAUNCH,
    LOG,
    STOP,
    TRAINING_LOCK,
    State,
    held,
    last_error,
    queue,
    recorded_state,
    remember,
)

__all__ = ["Job", "SlurmSweep"]

FOLDER = ".slurm"
# How often a run may reach its time limit; submitit wants a number.
CHAIN = 100_000
# An evaluation starts anew each time, so that another one hardly helps.
CHAIN_EVALUATIONS = 2


class Job:
    """What a Slurm job does in each of its tasks, which are the processes of one run.

    Args:
        out (str): the sweep's folder.
        node (Node): the run.
        argv (list[str]): one process of it.
        processes (int): for which the run was planned; its identity may depend on it.
        chained (int): how often it has been queued again by its time limit.
    """

    def __init__(self, out, node, argv, processes, chained=0):
        self.out, self.node, self.argv = out, node, argv
        self.processes, self.chained = processes, chained
        self._folder = os.path.join(out, node.id)
        self._child = None

    def __call__(self):
        """Run until the process ends, and queue the job again after a preemption or a crash.

        Raises:
            RuntimeError: the run cannot start, or has failed; Slurm then counts the job as failed.
        """
        task = submitit.JobEnvironment()
        self._check_parents()
        self.node = current(self.node, self.processes)  # with the weights that its parents have made
        if self._finished() or self._to_stop():
            return
        if task.num_tasks > 1:
            # Each sees all GPUs of its machine and takes the one of its local rank.
            torchrun = submitit.helpers.TorchDistributedEnvironment()
            torchrun.export(set_cuda_visible_devices=False, overwrite=True)
        if task.global_rank:
            code = self._run(subprocess.Popen(self.argv))
        else:
            # In no session of its own, so that Slurm's signals surely reach it.
            locks = [self._claim()]
            options = {"fds": locks, "session": False, "job_id": task.job_id}
            code = self._run(start(self._folder, self.node, self.argv, "slurm", **options))
            ended(self._folder, code)
        if self._to_stop() or (task.global_rank and code in (0, *STOPPED)):
            return
        if code == 0 and self._finished():
            return
        if code not in STOPPED and not (curable(self._folder, code) and self._crashes(task) <= RETRIES):
            raise RuntimeError(f"{self.node.id} ended with {code}: {last_error(self._folder)}")
        # Otherwise Slurm is ending the job itself: because it puts it back, or somebody has cancelled it.
        if (queue() or {}).get(task.job_id) == "RUNNING":
            subprocess.run(["scontrol", "requeue", task.job_id])

    def checkpoint(self):
        """Called by submitit on its signal: let the training write a checkpoint and end.

        Returns:
            DelayedSubmission or None: the same job, to be queued again; None where the run is to stop.

        Raises:
            RuntimeError: an evaluation that does not come to its end within the time limit.
        """
        if self._child is not None:
            self._child.terminate()
            with contextlib.suppress(ChildProcessError):
                # Not Popen.wait: the call that this signal has interrupted holds its lock.
                os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)
        if self._to_stop():
            return None
        if self.node.kind == "evaluate" and self.chained == CHAIN_EVALUATIONS:
            self._give_up()
        again = Job(self.out, self.node, self.argv, self.processes, self.chained + 1)
        return submitit.helpers.DelayedSubmission(again)

    def _give_up(self):
        why = (
            f"{self.node.id} reached the time limit {self.chained + 1} times, and an evaluation begins anew "
            "each time: give it longer with --slurm time=HOURS"
        )
        with open(os.path.join(self._folder, LOG), "a") as log:
            print(why, file=log)
        ended(self._folder, 1)
        raise RuntimeError(why)

    def _run(self, child):
        self._child = child
        return child.wait()

    def _to_stop(self):
        return os.path.exists(os.path.join(self._folder, STOP))

    def _finished(self):
        return recorded_state(self.out, self.node) is State.FINISHED

    def _check_parents(self):
        for parent in self.node.parents:
            state = read(os.path.join(self.out, parent, "run.json"), {}).get("state", "not started")
            if state != "done":
                raise RuntimeError(f"{self.node.id} needs {parent}, which is not done (run.json: {state})")

    def _claim(self):
        # What was killed a moment ago may take some time to let go.
        claim = _wait_for_claim(self._folder, patience=60)
        if claim is None:
            raise RuntimeError(f"{self.node.id} is being run by another process")
        return claim

    def _crashes(self, task):
        """How many starts of this job have crashed since the newest checkpoint, this one included.

        Whichever task it was.
        """
        folder, restart = Path(self.out, FOLDER), os.environ.get("SLURM_RESTART_COUNT", "0")
        name = f"{task.job_id}_crash_after_{reached(self._folder)}_"
        (folder / f"{name}{restart}").touch()
        return len(list(folder.glob(f"{name}*")))


def _wait_for_claim(folder, patience):
    """The claim of a run that nobody trains, or None after so many seconds."""
    end = time.monotonic() + patience
    while True:
        claim = lock(os.path.join(folder, CLAIM))
        if claim is not None and not held(os.path.join(folder, TRAINING_LOCK)):
            return claim
        if claim is not None:
            os.close(claim)
        if time.monotonic() > end:
            return None
        time.sleep(0.5)


class SlurmSweep:
    """Submits a plan and waits for its jobs.

    Args:
        out (str): the folder of all run folders, on a disk that all machines share.
        nodes (list[Node]): parents before what depends on them.
        num_gpus (int): processes per machine; as many GPUs unless ``gpus_per_node`` says otherwise.
        options (dict[str, str]): sbatch's long options, such as ``partition``, ``account``, ``nodes`` and
            ``cpus_per_task``; ``time`` is in hours.
        command (callable): ``command(node, num_gpus, out)`` returns a node's argv.
        poll (float): seconds between two looks at the queue.
    """

    def __init__(self, out, nodes, *, num_gpus=1, options=None, command=plan.command, poll=10):
        self.out, self.nodes = os.path.abspath(out), {node.id: node for node in nodes}
        self.outcome, self.jobs = {}, {}
        self._options = {key.replace("-", "_"): value for key, value in (options or {}).items()}
        self._num_gpus, self._command, self._poll = num_gpus, command, poll
        self._processes = num_gpus * sbatch.machines(self._options)

    def run(self):
        """Submit what is not finished, and return when none of the jobs is left.

        Returns:
            dict[str, State or str]: as :meth:`rethink_d2.sweep.launch.LocalSweep.run`. A signal ends the
            waiting alone; the jobs go on.

        Raises:
            ValueError: Slurm does not answer, or refuses a job; says why.
        """
        remember(self.out, self.nodes.values())
        with catch_signals() as signals:
            for node in self.nodes.values():
                if not signals:
                    self._submit(node)
            while not signals and (queue() is None or self._left()):
                time.sleep(self._poll)
        left = self._left()
        for id, job in self.jobs.items():
            self.outcome[id] = f"Slurm job {job} goes on" if job in left else self._judge(self.nodes[id])
        return self.outcome

    def _left(self):
        """Those of our jobs that have not ended."""
        return (queue() or {}).keys() & self.jobs.values()

    def _submit(self, node):
        folder = os.path.join(self.out, node.id)
        if self._queued(node, folder):
            return
        claim = _wait_for_claim(folder, patience=5)  # for another sweep that is just submitting it
        if claim is None:
            self.outcome[node.id] = "runs elsewhere"
            return
        try:
            if self._queued(node, folder):
                return
            state = recorded_state(self.out, current(node, self._processes))
            needed = [p for p in node.parents if p not in self.jobs and self.outcome[p] is not State.FINISHED]
            # Before its parents' weights are there, its identity is not known.
            settled = self.jobs.keys().isdisjoint(node.parents)
            if state is State.FINISHED or (state is State.CHANGED and settled):
                self.outcome[node.id] = state
            elif needed:
                self.outcome[node.id] = f"needs {needed[0]}"
            else:
                self._sbatch(node, folder)
        finally:
            os.close(claim)

    def _queued(self, node, folder):
        """Whether a job of this run is in the queue, by whichever sweep."""
        jobs, job = queue(), read(os.path.join(folder, LAUNCH), {}).get("job_id")
        if jobs is None:
            raise ValueError("squeue does not answer: is this a machine of the Slurm cluster?")
        if job in jobs:
            self.jobs[node.id] = job
            say(node.id, f"is Slurm job {job} already")
        return job in jobs

    def _sbatch(self, node, folder):
        executor = submitit.AutoExecutor(
            os.path.join(self.out, FOLDER), cluster="slurm", slurm_max_num_timeout=CHAIN
        )
        executor.update_parameters(**self._parameters(node))
        forget_stop(folder)
        try:
            argv = self._command(node, self._num_gpus // self._tasks(node), self.out)
            job = executor.submit(Job(self.out, node, argv, self._processes)).job_id
        except FailedJobError as e:
            raise ValueError(f"{node.id}: {e}") from e
        self.jobs[node.id] = job
        before = read(os.path.join(folder, LAUNCH), {}).get("identity")
        write_json(os.path.join(folder, LAUNCH), {"launcher": "slurm", "job_id": job, "identity": before})
        say(node.id, f"submitted as Slurm job {job}")

    def _tasks(self, node):
        """Tasks per machine: one for each process, but for a search, which starts its trials' processes."""
        return 1 if node.kind == "search" else self._num_gpus

    def _parameters(self, node):
        options = {"gpus_per_node": self._num_gpus, "requeue": True, **self._options}
        hours, nodes = sbatch.hours(options), sbatch.machines(options)
        options = {key: value for key, value in options.items() if key not in ("time", "nodes")}
        if node.kind == "search":
            nodes = 1
        if str(options["gpus_per_node"]) == "0":
            del options["gpus_per_node"]
        parents = [self.jobs[p] for p in node.parents if p in self.jobs]
        if parents:
            options["dependency"] = f"afterany:{':'.join(parents)}"
        return {
            "name": node.id,
            "timeout_min": round(hours * 60),
            "nodes": nodes,
            "tasks_per_node": self._tasks(node),
            "slurm_srun_args": ["--kill-on-bad-exit=1"],
            "slurm_additional_parameters": options,
        }

    def _judge(self, node):
        """The outcome of a node whose job has ended."""
        node = current(node, self._processes)
        remember(self.out, [node])
        state = recorded_state(self.out, node)
        lacking = [p for p in node.parents if self.outcome.get(p) is not State.FINISHED]
        say(node.id, state.value)
        return f"needs {lacking[0]}" if state is State.WAITING and lacking else state
