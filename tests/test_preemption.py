import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
from detectron2.utils import comm
from gloo import on_processes

from rethink_d2.preemption import (
    SIGNALS,
    Preempted,
    Preemption,
    agreeing,
    forward_to_children,
    ignore_signals,
)

fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def handlers():
    """Those of before, which must be there again after each test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_said(number, capfd):
    with Preemption() as preemption:
        assert not preemption.requested and not preemption.agreed()
        os.kill(os.getpid(), number)
        assert preemption.requested and preemption.agreed()
        if number != signal.SIGINT:
            os.kill(os.getpid(), number)
    assert preemption.requested
    assert capfd.readouterr().err == f"{signal.Signals(number).name}: stopping after a checkpoint\n"


def test_the_second_interrupt_ends_at_once():
    with pytest.raises(KeyboardInterrupt):
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert preemption.requested
            os.kill(os.getpid(), signal.SIGINT)


def test_all_batches_come_where_nothing_was_asked():
    loader = agreeing([1, 2, 3], Preemption())
    assert len(loader) == 3 and list(loader) == list(loader) == [1, 2, 3]


class Counts(Preemption):
    """Also counts how often the processes come to an agreement."""

    agreements = 0

    def agreed(self):
        self.agreements += 1
        return super().agreed()


def take(batches, stop_after):
    """What comes out of a loader when this process is asked to stop after some of it."""
    preemption, taken = Counts(), []
    try:
        for batch in agreeing(range(batches), preemption):
            taken.append(batch)
            preemption.requested = len(taken) == stop_after
    except Preempted:
        taken.append("preempted")
    assert preemption.agreements == 1
    return taken


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_pass_ends_early(stop_after):
    assert take(3, stop_after) == [*range(stop_after), "preempted"]


def take_by_rank(batches, stop_after):
    return take(batches[comm.get_rank()], stop_after[comm.get_rank()])


def test_a_pass_ends_on_every_process_if_one_was_asked(tmp_path):
    """Even where the other one is asked nothing, or has nothing to do at all."""
    for number, (batches, stop_after, expected) in enumerate(
        [
            ((5, 3), (2, None), [[0, 1, "preempted"], [0, 1, 2, "preempted"]]),
            ((0, 2), (None, 1), [["preempted"], [0, "preempted"]]),
            ((1, 2), (None, None), [[0], [0, 1]]),
        ]
    ):
        assert on_processes(tmp_path / str(number), 2, take_by_rank, batches, stop_after) == expected


def _child(ready, ignore):
    """Ends with the number of the first signal that it gets."""
    if ignore:
        ignore_signals()
    else:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    ready.set()
    sys.exit(time.sleep(60) if ignore else signal.sigwait(SIGNALS))


@pytest.fixture
def child():
    started = []

    def start(ignore=False):
        ready = fork.Event()
        started.append(fork.Process(target=_child, args=(ready, ignore), daemon=True))
        started[-1].start()
        assert ready.wait(20)
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def test_workers_outlive_signals(child):
    worker = child(ignore=True)
    for number in SIGNALS:
        os.kill(worker.pid, number)
    worker.join(0.2)
    assert worker.is_alive()


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_handed_on(child, number):
    children = [child(), child()]
    with forward_to_children():
        os.kill(os.getpid(), number)
        for process in children:
            process.join(20)
    # A terminal sends SIGINT to the children itself.
    expected = signal.SIGTERM if number == signal.SIGINT else number
    assert [process.exitcode for process in children] == [expected] * 2


def test_the_second_interrupt_ends_the_children(child):
    worker = child(ignore=True)
    with pytest.raises(KeyboardInterrupt):
        with forward_to_children():
            os.kill(os.getpid(), signal.SIGINT)
            assert worker.is_alive()
            os.kill(os.getpid(), signal.SIGINT)
    worker.join(20)
    assert worker.exitcode == -signal.SIGKILL


WORKERS_THAT_DO_NOT_LISTEN = """
    import multiprocessing, os, signal, sys, time
    from torch.utils.data import DataLoader
    from rethink_d2.preemption import end_workers, ignore_signals

    class Slow:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            time.sleep(600 if i > 1 else 0)
            return i

    end_workers()
    batches = iter(DataLoader(Slow(), batch_size=None, num_workers=2, worker_init_fn=ignore_signals))
    assert [next(batches), next(batches)] == [0, 1]
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {end}
"""
# Their pipe is full: nobody takes what they have prepared, and each holds the other's reading end open.
WORKERS_OF_A_KILLED_RUN = """
    import multiprocessing, os, signal, time
    from torch.utils.data import DataLoader
    from rethink_d2.preemption import ignore_signals

    class Large:
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return bytes(1 << 20)

    batches = iter(DataLoader(Large(), batch_size=None, num_workers=2, worker_init_fn=ignore_signals))
    next(batches)
    time.sleep(0.5)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def runs(pid):
    """Whether there is such a process that is not only left to be counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("end, code", [("sys.exit(75)", 75), ("raise ValueError", 1)])
def test_workers_that_do_not_listen_end_with_the_run(end, code):
    script = textwrap.dedent(WORKERS_THAT_DO_NOT_LISTEN).format(end=end)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert_that_two_end(done.stdout.split())


def test_workers_end_when_their_run_is_killed():
    script = textwrap.dedent(WORKERS_OF_A_KILLED_RUN)
    # Not a pipe, which the workers would keep open.
    with tempfile.TemporaryFile("w+") as said:
        killed = subprocess.run([sys.executable, "-c", script], stdout=said, timeout=100)
        assert killed.returncode == -signal.SIGKILL
        said.seek(0)
        assert_that_two_end(said.read().split())


def assert_that_two_end(workers):
    assert len(workers) == 2
    end = time.monotonic() + 20
    while any(map(runs, workers)):
        assert time.monotonic() < end
        time.sleep(0.01)
