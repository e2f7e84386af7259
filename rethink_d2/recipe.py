"""From a config file and overrides to one settled recipe.

:func:`load` reads, :func:`resolve` writes out everything that follows from other settings (schedule,
groups, linear scaling), :func:`check` says what does not belong together, :func:`identity` tells
whether two recipes train the same thing.
"""

import hashlib
import json
import os
from ast import literal_eval
from itertools import zip_longest

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.utils.file_io import PathManager

from .checks import Problem, check
from .config import add_rethink_config
from .data.content import content_digest
from .data.index import dataset_digest
from .solver.schedule import parse
from .spelling import nearest

__all__ = [
    "EVALUATION_KEYS",
    "FREE",
    "SCHEDULE",
    "Problem",
    "check",
    "classify",
    "default_config",
    "differences",
    "flatten",
    "identity",
    "load",
    "resolve",
    "settings",
    "shared_iterations",
]

# Processes of the paper's recipe (section 4: 8 GPUs x 2 images).
RECIPE_WORLD_SIZE = 8

# Keys that cannot change what a run computes: where it writes, how often it looks, how fast it reads.
FREE = frozenset(
    {
        "VERSION",
        "OUTPUT_DIR",
        "VIS_PERIOD",
        "LOG.WRITERS",
        "MODEL.DEVICE",
        "DATALOADER.NUM_WORKERS",
        "SOLVER.CHECKPOINT_PERIOD",
        "SOLVER.CHECKPOINT_KEEP",
        "SOLVER.CHECKPOINT_BEST",
        "SOLVER.CHECKPOINT_BACKGROUND",
        "SOLVER.CHECKPOINT_REQUIRED",
        "SOLVER.BRANCH_POINTS",
        # These two decide whether a run with bad input goes on at all.
        "SOLVER.SKIP_NONFINITE",
        "DATALOADER.ON_BAD_IMAGE",
        "TEST.EVAL_PERIOD",
        "TEST.AUG.IMS_PER_BATCH",
        "TEST.EXPECTED_RESULTS",
    }
)
# Keys that change a run only from its first rate drop on. Every other key, a new one included, is
# taken to change the trajectory from the first iteration.
SCHEDULE = frozenset({"SOLVER.SCHEDULE", "SOLVER.MAX_ITER", "SOLVER.STEPS"})
# Keys of problems that also make an evaluation alone wrong.
EVALUATION_KEYS = frozenset(
    {
        "MODEL",
        "MODEL.WEIGHTS",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.ROI_HEADS.NUM_CLASSES",
        "MODEL.RETINANET.NUM_CLASSES",
        "MODEL.CLASSIFIER.NUM_CLASSES",
        "INPUT.FORMAT",
        "INPUT.MAPPER",
        "INPUT.MIN_SIZE_TEST",
        "DATASETS.TEST",
    }
)
_NORMED = ("RESNETS", "VGG", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def classify(key):
    """Tell what a config key can change.

    Args:
        key (str): a dotted key.

    Returns:
        str: "free", "schedule" or "trajectory".
    """
    return "free" if key in FREE else "schedule" if key in SCHEDULE else "trajectory"


def flatten(tree, prefix=""):
    """List the leaves of a config.

    Args:
        tree (dict): a config or a part of one.
        prefix (str): put before every key.

    Returns:
        dict[str, object]: value by dotted key.
    """
    leaves = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flatten(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _split(cfg, key):
    *path, last = key.split(".")
    node = cfg
    for part in path:
        node = node[part]
    return node, last


def _like(value, default):
    """Make lists and tuples alike, inner ones too: YAML knows only lists."""
    if not isinstance(value, (list, tuple)) or not isinstance(default, (list, tuple)):
        return value
    return type(default)(_like(v, default[0] if default else None) for v in value)


def _coerce(key, value, default, source):
    """Bring a value as read from YAML or the command line to the type of the key's default."""
    decoded = value
    if isinstance(value, str):
        try:
            decoded = literal_eval(value)
        except (ValueError, SyntaxError):
            pass
    if default is None:
        return decoded
    if isinstance(default, str):
        # yacs would turn SOLVER.SCHEDULE "300" into a number and then refuse it.
        if isinstance(value, str):
            return decoded if isinstance(decoded, str) else value
        if key == "SOLVER.SCHEDULE" and type(value) is int:
            return str(value)
    elif isinstance(default, (list, tuple)) and isinstance(decoded, (list, tuple)):
        return _like(decoded, default)
    elif type(default) is float and type(decoded) is int:
        return float(decoded)
    elif type(decoded) is type(default):
        return decoded
    hint = ""
    if isinstance(default, (list, tuple)) and isinstance(decoded, (str, int, float)):
        example = type(default)([decoded])
        hint = f'; write {key} "{example!r}" for a single value'
    raise ValueError(
        f"{source}: {key} is {value!r} ({type(decoded).__name__}), but must be of type "
        f"{type(default).__name__} (now {default!r}){hint}"
    )


def _merge(cfg, leaves, source):
    """Write dotted keys into a config, refusing those that it does not have."""
    known = flatten(cfg)
    for key, value in leaves.items():
        if key not in known:
            inner = [k for k in known if k.startswith(f"{key}.")]
            if inner:
                raise ValueError(f"{source}: {key} is a group of keys, not a value; it has {inner[0]}, ...")
            raise ValueError(f"{source}: {key} is not a config key{nearest(key, known)}")
        node, last = _split(cfg, key)
        node[last] = _coerce(key, value, known[key], source)


def default_config():
    """Detectron2's defaults and this project's."""
    cfg = get_cfg()
    add_rethink_config(cfg)
    return cfg


def load(config_file, opts):
    """Read a config file and command line overrides.

    Args:
        config_file (str): a YAML file, with ``_BASE_`` as in Detectron2; "" for the defaults alone.
        opts (list[str]): alternating keys and values.

    Returns:
        CfgNode: the merged config, not yet resolved.

    Raises:
        ValueError: no such file, or a key or value that does not exist or fit; says where, and what
            was probably meant.
    """
    cfg = default_config()
    if config_file:
        try:
            tree = CfgNode.load_yaml_with_base(config_file, allow_unsafe=True)
        except OSError as e:
            at = e.filename or config_file
            by = "" if at == config_file else f" (a _BASE_ of {config_file})"
            why = "" if isinstance(e, FileNotFoundError) else f": {e.strerror}"
            raise ValueError(f"there is no config file {at}{by}{why}") from e
        except (yaml.YAMLError, AssertionError, TypeError, AttributeError) as e:
            raise ValueError(f"{config_file} is not a config file: {e}") from e
        if not isinstance(tree, dict):
            raise ValueError(f"{config_file} is not a config file: it holds no keys")
        _merge(cfg, flatten(tree), config_file)
    if len(opts) % 2:
        raise ValueError(
            f"overrides are pairs of a key and a value, but {len(opts)} were given: {' '.join(opts)}"
        )
    given = dict(zip(opts[::2], opts[1::2], strict=True))
    _merge(cfg, given, "command line")
    computed = [k for k in ("SOLVER.MAX_ITER", "SOLVER.STEPS") if k in given]
    if computed and cfg.SOLVER.SCHEDULE:
        raise ValueError(
            f"command line: {' and '.join(computed)} would be overwritten, because SOLVER.SCHEDULE is "
            f"{cfg.SOLVER.SCHEDULE!r}; override SOLVER.SCHEDULE instead, e.g. SOLVER.SCHEDULE 300, or set "
            "SOLVER.SCHEDULE ''"
        )
    return cfg


def _scale(cfg, world_size):
    """Apply Detectron2's linear scaling, to a literal length too."""
    solver = cfg.SOLVER
    reference = solver.REFERENCE_WORLD_SIZE
    if reference <= 0 or reference == world_size:
        return cfg
    if solver.IMS_PER_BATCH % reference:
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} cannot be divided among the "
            f"{reference} processes of SOLVER.REFERENCE_WORLD_SIZE"
        )
    schedule = solver.SCHEDULE
    if schedule and not schedule.strip().lower().endswith("x"):
        # "6x" counts images and follows the batch by itself; "300" counts iterations.
        length = parse(schedule, solver.IMS_PER_BATCH, solver.ONE_X).max_iter
        schedule = str(max(1, round(length * reference / world_size)))
    scaled = DefaultTrainer.auto_scale_workers(cfg, world_size).clone()
    scaled.defrost()
    scaled.SOLVER.SCHEDULE = schedule
    return scaled


def _syncbn_parts(cfg):
    """The config groups below MODEL whose NORM is a synchronized batch norm."""
    return [part for part in _NORMED if "syncbn" in str(cfg.MODEL[part].NORM).lower()]


def resolve(cfg, world_size=None):
    """Write out what follows from other settings; resolving twice changes nothing more.

    SOLVER.SCHEDULE decides MAX_ITER, STEPS, LR_SCHEDULER_NAME and a warm-up that ends before the first drop;
    there are no more loader workers than cores.

    Args:
        cfg (CfgNode): a config with this project's keys; it stays as it is.
        world_size (int or None): number of processes. None stands for the recipe's own
            (SOLVER.REFERENCE_WORLD_SIZE, else 8) and counts for SOLVER.IMS_PER_GROUP alone.

    Returns:
        CfgNode: a copy, frozen if ``cfg`` is. For several processes on a CPU synchronized batch norms are
        naiveSyncBN_N in it, because torch's SyncBatchNorm refuses the CPU.

    Raises:
        ValueError: the schedule is malformed or linear scaling is impossible; names the key.
    """
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    if world_size is not None:
        cfg = _scale(cfg, world_size)
        if world_size > 1 and cfg.MODEL.DEVICE == "cpu":
            for part in _syncbn_parts(cfg):
                cfg.MODEL[part].NORM = "naiveSyncBN_N"
    solver = cfg.SOLVER
    if solver.SCHEDULE:
        schedule = parse(solver.SCHEDULE, solver.IMS_PER_BATCH, solver.ONE_X)
        solver.MAX_ITER = schedule.max_iter
        solver.STEPS = tuple(schedule.steps)
        solver.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
        if solver.STEPS:
            solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, solver.STEPS[0])
    processes = world_size or solver.REFERENCE_WORLD_SIZE or RECIPE_WORLD_SIZE
    # SyncBN's statistics span the processes of one pass, so its batch cannot be made up of several.
    if solver.IMS_PER_GROUP == 0 or (world_size is not None and _syncbn_parts(cfg)):
        solver.IMS_PER_GROUP = max(1, solver.IMS_PER_BATCH // processes)
    # More loader workers than cores only take memory and switch.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cfg.DATALOADER.NUM_WORKERS = min(cfg.DATALOADER.NUM_WORKERS, cores)
    if frozen:
        cfg.freeze()
    return cfg


def _digest(path):
    """The sha256 of a local file, None when the name is not one."""
    if not path or "://" in path or not PathManager.isfile(path):
        return None
    return content_digest(PathManager.get_local_path(path))


def settings(cfg):
    """Everything that decides what a run computes.

    Args:
        cfg (CfgNode): a resolved config.

    Returns:
        dict[str, object]: value by dotted key, without those in :data:`FREE`, as JSON has it. Local weights
        enter by their content, so that moving the file is no change; data sets by name and, where
        data/index.py serves them, content.
    """
    leaves = {key: value for key, value in flatten(cfg).items() if classify(key) != "free"}
    digest = _digest(cfg.MODEL.WEIGHTS)
    if digest is not None:
        leaves["MODEL.WEIGHTS"] = f"sha256:{digest}"
    for key in ("DATASETS.TRAIN", "DATASETS.TEST"):
        digests = [(name, dataset_digest(name)) for name in leaves[key]]
        leaves[key] = [f"{name}@sha256:{found}" if found else name for name, found in digests]
    return json.loads(json.dumps(leaves))


def identity(cfg):
    """Name what a run computes: equal for two configs that must give the same result.

    Args:
        cfg (CfgNode): a resolved config.

    Returns:
        str: a sha256 in hex over :func:`settings`.
    """
    text = json.dumps(settings(cfg), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old, new):
    """Compare what two configs compute.

    Args:
        old (dict), new (dict): from :func:`settings`. A key that one lacks, because another version wrote
            it, counts as having its default.

    Returns:
        dict[str, tuple]: old and new value by key, for those that differ.
    """
    defaults = flatten(default_config())
    default = {key: json.loads(json.dumps(value)) for key, value in defaults.items()}
    return {
        key: (old.get(key, default.get(key)), new.get(key, default.get(key)))
        for key in sorted({*old, *new})
        if old.get(key, default.get(key)) != new.get(key, default.get(key))
    }


def shared_iterations(old, new):
    """How many iterations two runs have in common that differ in their schedule at most.

    Args:
        old (dict), new (dict): from :func:`settings`.

    Returns:
        int: the rate of all earlier iterations is the same in both; at most the length of the shorter run.
    """
    shortest = min(old["SOLVER.MAX_ITER"], new["SOLVER.MAX_ITER"])
    steps = zip_longest(old["SOLVER.STEPS"], new["SOLVER.STEPS"], fillvalue=shortest)
    if not differences(old, new).keys() & SCHEDULE:
        return shortest
    if old["SOLVER.LR_SCHEDULER_NAME"] != "WarmupMultiStepLR" or old["SOLVER.RESCALE_INTERVAL"]:
        return 0  # such rates depend on the length from the first iteration on
    return min([shortest, *(min(a, b) for a, b in steps if a != b)])
