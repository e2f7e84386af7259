"""One run from the command line: ``python -m rethink_d2.train --config-file ...``."""

import contextlib
import logging
import os
import sys

import torch
from detectron2.engine import default_argument_parser, default_setup, hooks
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from filelock import FileLock, Timeout

from . import paper, recipe
from .checks import UNBUILDABLE
from .data.files import missing_files
from .data.loader import count_images
from .dry_run import summary
from .engine import checkpoint
from .engine.record import RunRecord
from .engine.start import agree_on, find_start, find_weights
from .engine.trainer import Trainer, build_initialized_model, evaluate_all
from .files import read_json
from .launch import fall_back_to_cpu, launch, share_cores, under_torchrun, world_size
from .modeling.inspection import build_meta
from .modeling.safe_weights import SafeCheckpointer
from .preemption import EXIT_CODE, Preempted, Preemption

logger = logging.getLogger(__name__)

# In a run folder: the file whose lock its one writer holds.
LOCK = ".lock"

MEMORY_ADVICE = (
    "The GPU ran out of memory. What helps, first to last: SOLVER.IMS_PER_GROUP 1 (a batch of the same size "
    "in smaller steps, but not with SyncBN), SOLVER.AMP.ENABLED True (about half the memory), and, where the "
    "paper's setting need not be kept, a smaller INPUT.MAX_SIZE_TRAIN. Each is another recipe: start anew, "
    "or go on by --resume with --allow-config-change and the key."
)


def argument_parser():
    """Detectron2's arguments and this project's."""
    parser = default_argument_parser()
    # Detectron2 collects the config options as the remainder, so ours must stand before them.
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe and exit; write nothing"
    )
    parser.add_argument(
        "--branch-from",
        metavar="FOLDER",
        help="start from the newest checkpoint of that run up to which both are the same run; with "
        "--resume only where OUTPUT_DIR has no checkpoint of its own",
    )
    parser.add_argument(
        "--allow-config-change",
        metavar="KEY",
        action="append",
        help="resume or branch although this key differs; may be repeated",
    )
    parser.add_argument(
        "--deterministic", action="store_true", help="deterministic GPU kernels: exact repeats, slower"
    )
    return parser


def run_id(args):
    """The manifest's id of the config, or the config file's name where it is not the paper's."""
    run = paper.for_config(args.config_file)
    return run.id if run else os.path.splitext(os.path.basename(args.config_file))[0] or "run"


def prepare(args):
    """The config of a run, resolved for the processes and the device that it gets.

    Raises:
        ValueError: a bad key, value, or number of processes, with the cure.
    """
    cfg = recipe.load(args.config_file, args.opts)
    if args.num_gpus < 1:
        raise ValueError(f"--num-gpus {args.num_gpus}: at least 1 process is needed, without a GPU too")
    several = args.num_gpus > 1
    if not (args.dry_run and several):  # several GPUs may be another machine's, which it is planned for
        if several and not torch.cuda.is_available() and cfg.MODEL.DEVICE != "cpu":
            raise ValueError(
                f"--num-gpus {args.num_gpus}: this machine has no CUDA GPU. To train with several CPU "
                "processes, add MODEL.DEVICE cpu"
            )
        fall_back_to_cpu(cfg)
        if cfg.MODEL.DEVICE == "cuda" and args.num_gpus > torch.cuda.device_count():
            raise ValueError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs")
    cfg = recipe.resolve(cfg, world_size(args))
    cfg.freeze()
    return cfg


def dry_run(cfg, args):
    """Print the recipe as it would run."""
    names = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST}
    sizes = {name: count_images(name) for name in names if not missing_files(name)}
    run = paper.for_config(args.config_file)
    print(summary(cfg, build_meta(cfg), sizes, world_size(args), run))


def main(args):
    """One process of a run: train, or evaluate with ``--eval-only``."""
    share_cores()
    cfg = prepare(args)
    default_setup(_setup_of(cfg, args), args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="rethink_d2", abbrev_name="r2")
    if comm.is_main_process():
        for problem in recipe.check(cfg, comm.get_world_size()):
            logger.warning(problem)
    if cfg.MODEL.DEVICE == "cpu":
        logger.info("No GPU in use: running on the CPU with %d threads", torch.get_num_threads())
    if args.eval_only:
        with alone(cfg):
            return evaluate_only(cfg, args)
    with Preemption() as preemption, alone(cfg):
        start = agree_on(start_of(cfg, args) if comm.is_main_process() else None)
        train(cfg, args, start, preemption)
        comm.synchronize()  # none ends, and so has the others ended, before the record is written


def _setup_of(cfg, args):
    """What Detectron2's set-up may write down: not the config of a run that is only evaluated."""
    if not args.eval_only or not checkpoint.checkpoints(cfg.OUTPUT_DIR):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = None
    return cfg


def train(cfg, args, start, preemption):
    """Train from `start` on, and keep run.json true about how it ends."""
    if args.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    record = RunRecord(
        cfg.OUTPUT_DIR,
        run_id=run_id(args),
        identity=recipe.identity(cfg),
        seed=cfg.SEED,
        parent=start.parent,
    )
    period = cfg.SOLVER.CHECKPOINT_PERIOD

    def keep_time(trainer):
        """With each checkpoint, so that of a run that is killed what it keeps is counted."""
        if period > 0 and (trainer.iter + 1) % period == 0:
            record.write("running")

    try:
        trainer = Trainer(cfg, start, preemption)
        trainer.register_hooks([hooks.CallbackHook(after_step=keep_time)])
        trainer.train()
    except Preempted:
        record.write("preempted")
        logger.info("Stopped as asked; --resume goes on from here")
        return
    except BaseException as e:
        record.fail(e)
        if isinstance(e, torch.OutOfMemoryError):
            logger.error(MEMORY_ADVICE)
        raise
    record.write("done")


def start_of(cfg, args):
    """Where the run starts; see :func:`rethink_d2.engine.start.find_start`."""
    return find_start(
        cfg, resume=args.resume, branch_from=args.branch_from, allow=args.allow_config_change or ()
    )


def weights_of(cfg, args):
    """What is evaluated; see :func:`rethink_d2.engine.start.find_weights`."""
    return find_weights(cfg, resume=args.resume, allow=args.allow_config_change or ())


def alone(cfg):
    """A context in which no other run writes to OUTPUT_DIR; the main process sees to it."""
    return lock_folder(cfg, 10) if comm.is_main_process() else contextlib.nullcontext()


def lock_folder(cfg, seconds):
    """Become the one process that trains, or evaluates, in OUTPUT_DIR.

    Args:
        seconds (float): how long to wait for another one to end.

    Returns:
        a context that ends the lock. The lock is the system's: it goes with the process, however that ends.

    Raises:
        ValueError: another process does.
    """
    try:
        return FileLock(os.path.join(cfg.OUTPUT_DIR, LOCK)).acquire(seconds)
    except Timeout as e:
        raise ValueError(
            f"OUTPUT_DIR {cfg.OUTPUT_DIR}: another process is at work there; wait for it, stop "
            "it, or set another OUTPUT_DIR"
        ) from e


def evaluate_only(cfg, args):
    """Evaluate on DATASETS.TEST."""
    model = build_initialized_model(cfg)
    loaded = SafeCheckpointer(model).load(weights_of(cfg, args))
    evaluate_all(cfg, model, loaded.get("iteration", -1) + 1)


def cli(argv=None):
    """The command line.

    Returns:
        int: 0; 2 where the run is refused; 75 where it was asked to stop and can be resumed. Other failures
        raise.
    """
    args = argument_parser().parse_args(argv)
    training = not args.eval_only and not args.dry_run
    try:
        cfg = prepare(args)
        if not args.dry_run and not under_torchrun():
            if os.path.exists(os.path.join(cfg.OUTPUT_DIR, LOCK)):
                lock_folder(cfg, 0).lock.release()
            (start_of if training else weights_of)(cfg, args)
    except (ValueError, checkpoint.CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    problems = recipe.check(cfg, world_size(args))
    if args.eval_only:  # nothing is trained, so only what evaluation needs can be wrong
        problems = [p for p in problems if p.key in recipe.EVALUATION_KEYS]
    for problem in problems:
        print(f"{problem.level}: {problem}", file=sys.stderr)
    if args.dry_run and not any(p.key == UNBUILDABLE for p in problems):
        dry_run(cfg, args)
    if any(p.level == "error" for p in problems):
        return 2
    if not args.dry_run:
        launch(main, args)
    if training and read_json(os.path.join(cfg.OUTPUT_DIR, "run.json"), {}).get("state") == "preempted":
        return EXIT_CODE
    return 0


if __name__ == "__main__":
    sys.exit(cli())
