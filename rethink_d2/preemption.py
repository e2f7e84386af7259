"""Stop a run in order when the system asks for it.

Schedulers send SIGTERM, SIGUSR1 or SIGUSR2 before they take a machine away, a terminal sends SIGINT for
Ctrl-C. The run then finishes its iteration, writes a checkpoint and ends with :data:`EXIT_CODE`; ``--resume``
goes on as if nothing had happened.
"""

import contextlib
import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading

from detectron2.utils import comm

__all__ = [
    "EXIT_CODE",
    "Preempted",
    "Preemption",
    "agreeing",
    "end_if_orphaned",
    "end_workers",
    "forward_to_children",
    "ignore_signals",
    "watch_parent",
]

logger = logging.getLogger(__name__)

# EX_TEMPFAIL of sysexits.h: try again later.
EXIT_CODE = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class Preempted(Exception):
    """The run was asked to stop, and every process knows."""


def ignore_signals(_=None):
    """Let a loader's worker outlive signals to its whole group: the run still needs it to stop in order.

    A ``worker_init_fn``; :func:`end_workers` then has to end such workers, unless the run is killed.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    watch_parent()


def watch_parent():
    """End this process within a second after the one that started it has ended, however that happened.

    PyTorch's launched processes notice that from their start on only, which takes seconds to come. Its loader
    workers do, but then wait for ever to hand over what they have prepared, and keep inherited locks.

    Returns:
        threading.Event: set it to end the watch.
    """
    over = threading.Event()

    def watch():
        while not over.wait(1):
            end_if_orphaned()

    end_if_orphaned()
    threading.Thread(target=watch, daemon=True).start()
    return over


def end_if_orphaned():
    """End this process at once if the one that started it was killed meanwhile."""
    parent = multiprocessing.parent_process()
    if parent is not None and os.getppid() != parent.pid:
        os._exit(1)


def end_workers():
    """Make sure that workers which ignore SIGTERM end with this process, however it ends."""
    # Finalizers run before multiprocessing sends SIGTERM to daemons and waits for them.
    multiprocessing.util.Finalize(None, _kill_daemons, exitpriority=10)


def _kill_daemons():
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class Preemption:
    """Notes a request to stop, while it is the active context of the main thread.

    A second Ctrl-C raises KeyboardInterrupt at once.

    Attributes:
        requested (bool): whether this process was asked to stop.
    """

    def __init__(self):
        self.requested = False
        self._interrupts = 0
        self._before = {}

    def __enter__(self):
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.requested:
            # os.write, because logging takes locks that the interrupted code may hold.
            os.write(2, f"{signal.Signals(number).name}: stopping after a checkpoint\n".encode())
        self.requested = True

    def agreed(self):
        """Whether any process was asked to stop. Every process must call this."""
        return any(comm.all_gather(self.requested))


class agreeing:
    """A loader that ends early when this process is asked to stop, then asks all others.

    Every process comes to the agreement exactly once for each pass over its loader, wherever it is
    stopped, so that none is left waiting for the results of another.

    Args:
        loader (iterable): of one evaluation; must have a length.
        preemption (Preemption): the request.

    Raises:
        Preempted: at the end of the pass, on every process, when any of them was asked to stop.
    """

    def __init__(self, loader, preemption):
        self._loader, self._preemption = loader, preemption

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        for batch in self._loader:
            if self._preemption.requested:
                break
            yield batch
        if self._preemption.agreed():
            raise Preempted


@contextlib.contextmanager
def forward_to_children():
    """While active, hand signals on to the processes that this one has started and waits for.

    A terminal's Ctrl-C reaches the children by itself, so it is handed on as SIGTERM, which they count as
    no second Ctrl-C; a second one ends them at once.
    """
    interrupts = 0

    def handle(number, frame):
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for child in multiprocessing.active_children():
            if interrupts > 1:
                child.kill()
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGTERM if number == signal.SIGINT else number)
        if interrupts > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
