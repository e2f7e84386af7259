"""Run a function on several CPU processes that gloo joins."""

import multiprocessing
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from detectron2.utils import comm

# One server imports everything once; processes forked from it start at once.
multiprocessing.set_forkserver_preload(["rethink_d2.engine", "torch.utils.tensorboard"])

# Much longer than any test needs: whoever waits so long waits in vain.
LIMIT = 120


def _enter(rank, folder, processes, function, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'rendezvous'}",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=LIMIT),
    )
    comm.create_local_process_group(processes)
    torch.save(function(*args), folder / f"{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def on_processes(folder, processes, function, *args):
    """What a function returns on each of several processes of one thread.

    Args:
        folder (Path): for what they exchange; is made.
        processes (int): how many.
        function (callable): of a module's top level.
        args: for it, the same on every process.

    Returns:
        list: by rank.
    """
    folder.mkdir(parents=True)
    context = torch.multiprocessing.start_processes(
        _enter, (folder, processes, function, args), processes, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1, grace_period=5):
            assert time.monotonic() < end, "the processes hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pth", weights_only=False) for rank in range(processes)]
