"""Start the processes of a run: one, several on this machine, or torchrun's."""

import contextlib
import logging
import os

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.engine import launch as detectron2_launch
from detectron2.utils import comm

from .preemption import end_if_orphaned, forward_to_children, watch_parent

logger = logging.getLogger(__name__)


def under_torchrun():
    """Whether torchrun, or a scheduler that sets its variables, started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} <= set(os.environ)


def world_size(args):
    """The number of processes of the run that `args` describes."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else args.num_gpus * args.num_machines


def launch(main, args):
    """Run ``main(args)`` on every process of the run and return when all have ended.

    NCCL joins GPUs, gloo joins CPU processes, which share the machine's cores.

    Args:
        main (callable): a top-level function; it must be importable by a new process.
        args (argparse.Namespace): Detectron2's launch arguments.
    """
    if not under_torchrun():
        several = args.num_gpus * args.num_machines > 1
        with forward_to_children() if several else contextlib.nullcontext():
            detectron2_launch(
                _Launched(main) if several else main,
                args.num_gpus,
                num_machines=args.num_machines,
                machine_rank=args.machine_rank,
                dist_url=args.dist_url,
                args=(args,),
            )
        return
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # As long as with Detectron2's launch: evaluation on one process may take longer than torch's 10 minutes.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        main(args)
    finally:
        dist.destroy_process_group()


class _Launched:
    """The main function of a launched process, which ends with the launching one from its arrival there on.

    PyTorch sees to that once this process has imported everything; in the meantime it would wait for others
    that never come.
    """

    def __init__(self, main):
        self._main = main

    def __setstate__(self, state):
        self.__dict__.update(state, _joined=watch_parent())

    def __call__(self, args):
        self._joined.set()
        end_if_orphaned()
        return self._main(args)


def fall_back_to_cpu(cfg):
    """Set MODEL.DEVICE to cpu, in place, where there is no CUDA GPU."""
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"


def share_cores():
    """Divide this machine's cores among its CPU processes, which would otherwise each take all."""
    local = comm.get_local_size() if dist.is_initialized() else 1
    if local > 1 and not torch.cuda.is_available():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
