"""Everything that can be known to be wrong with a whole sweep before its first run."""

import os
import shutil
import socket
import subprocess

import torch
from detectron2.utils.file_io import PathManager

from .. import recipe
from ..engine.checkpoint import checkpoints
from . import sbatch
from .plan import resolved
from .process import current
from .state import State, node_state

__all__ = ["preflight"]


def preflight(out, nodes, *, num_gpus=1, slurm=None):
    """Look for all problems of the runs that are not finished, and fetch the public weights that they need.

    Args:
        out (str): the sweep's folder.
        nodes (list[Node]): of the plan.
        num_gpus (int): processes of one run; on Slurm, on each of its machines.
        slurm (dict[str, str] or None): the options of sbatch, where that is the launcher.

    Returns:
        list[str]: each with what to do about it; empty when nothing is known to be wrong.
    """
    processes = num_gpus * sbatch.machines(slurm or {})
    nodes = [current(node, processes) for node in nodes]
    states = {node.id: node_state(out, node) for node in nodes}
    unfinished = [node for node in nodes if states[node.id] is not State.FINISHED]
    configs = {node.id: _config(node, processes) for node in unfinished}
    return [
        *_changed(out, unfinished, states, processes),
        *_recipes(out, unfinished, nodes, configs, processes),
        *_remote_weights(out, unfinished, configs),
        *_disk(out, unfinished),
        *(_machine(configs, num_gpus) if slurm is None else _partition(slurm)),
    ]


def _config(node, processes):
    """Its config, or what is wrong with that."""
    try:
        return resolved(node, processes)
    except ValueError as e:
        return str(e)


def _changed(out, unfinished, states, processes):
    for node in unfinished:
        known = all(states.get(parent) is State.FINISHED for parent in node.parents)  # and so its weights
        if states[node.id] is State.CHANGED and known:
            folder = os.path.join(out, node.id)
            keys = _differing(os.path.join(folder, "config.yaml"), node, processes)
            yield f"{folder} holds a run of another recipe{keys}: move it away, or give another --out"


def _differing(path, node, processes):
    try:
        then = recipe.settings(recipe.resolve(recipe.load(path, []), processes))
    except ValueError:
        return ""
    found = recipe.differences(then, recipe.settings(resolved(node, processes)))
    keys = ", ".join(f"{k}: {old!r}, now {new!r}" for k, (old, new) in found.items())
    return f" ({keys or 'the content of its data or weights, or a version with other keys'})"


def _recipes(out, unfinished, nodes, configs, processes):
    """What recipe.check finds, each problem once."""
    made = {os.path.abspath(os.path.join(out, node.id)) for node in nodes}
    runs = {}
    for node in unfinished:
        cfg = configs[node.id]
        if isinstance(cfg, str):
            runs.setdefault(cfg, []).append(node.id)
            continue
        for problem in recipe.check(cfg, processes):
            # Weights that a run of this plan makes need not exist yet.
            ours = (
                problem.key == "MODEL.WEIGHTS" and os.path.dirname(os.path.abspath(cfg.MODEL.WEIGHTS)) in made
            )
            unused = node.kind == "evaluate" and problem.key not in recipe.EVALUATION_KEYS
            if problem.level == "error" and not ours and not unused:
                runs.setdefault(str(problem), []).append(node.id)
    for problem, ids in runs.items():
        more = f" and {len(ids) - 2} more" if len(ids) > 2 else ""
        yield f"{problem} (needed by {', '.join(ids[:2])}{more})"


def _remote_weights(out, unfinished, configs):
    """Public weights that cannot be had. The others are in the cache afterwards, where the runs look."""
    names = {
        configs[node.id].MODEL.WEIGHTS
        for node in unfinished
        # Others start from a checkpoint.
        if not (isinstance(configs[node.id], str) or node.branch_from or checkpoints(f"{out}/{node.id}"))
    }
    for name in sorted(name for name in names if "://" in name):
        print(f"Fetching {name}, unless it is in the cache", flush=True)
        try:
            PathManager.get_local_path(name)
        except Exception as e:  # whatever the network, the server or the disk raises
            yield (
                f"MODEL.WEIGHTS {name} cannot be fetched ({type(e).__name__}: {e}): start the sweep with "
                "a network once, or copy $FVCORE_CACHE (~/.torch/iopath_cache) from where there is one"
            )


def _disk(out, unfinished):
    folder = os.path.abspath(out)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    need, free = sum(node.disk_gb for node in unfinished), shutil.disk_usage(folder).free / 1e9
    if need > free:
        yield f"{out}: the runs need {need:,.1f} GB, {free:,.1f} are free: free some, or give another --out"
    if not os.access(folder, os.W_OK):
        yield f"{out} cannot be written: give another --out"


def _machine(configs, num_gpus):
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if num_gpus > count:
            yield f"--num-gpus {num_gpus}: this machine has {count} GPUs"
    elif num_gpus > 1 and any(not isinstance(c, str) and c.MODEL.DEVICE != "cpu" for c in configs.values()):
        yield f"--num-gpus {num_gpus}: this machine has no CUDA GPU; leave it out to run on the CPU"
    if num_gpus > 1:
        try:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
        except OSError as e:
            yield f"no free port on 127.0.0.1 for the processes of a run to meet ({e})"


def _partition(options):
    if shutil.which("sbatch") is None:
        yield "--launcher slurm: there is no sbatch here: start the sweep on a machine of the Slurm cluster"
        return
    asked = ["sinfo", "--noheader", "--format=%P %l"]  # the default partition's name ends in *
    try:
        found = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        yield "--launcher slurm: Slurm does not answer within a minute"
        return
    if found.returncode:
        yield f"--launcher slurm: Slurm does not answer: {found.stderr.strip()}"
        return
    limits = dict(line.split() for line in found.stdout.splitlines())
    default = [name for name in limits if name.endswith("*")]
    limits = {name.removesuffix("*"): limit for name, limit in limits.items()}
    wanted = options.get("partition")
    names = wanted.split(",") if wanted else [name.removesuffix("*") for name in default]
    for name in names:
        if name not in limits:
            known = ", ".join(sorted(limits))
            yield f"--slurm partition={wanted}: there is no {name}; this cluster has {known}"
    hours = sbatch.hours(options)
    if names and all(name in limits and hours > sbatch.limit(limits[name]) for name in names):
        most = ", ".join(f"{limits[name]} in {name}" for name in names)
        yield f"--slurm time={hours:g}: jobs may take {most}; give less, longer runs go on in their next job"
