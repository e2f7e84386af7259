"""What a recipe amounts to before it runs, as text."""

from .disk import checkpoint_bytes, checkpoints_kept
from .modeling.inspection import frozen_modules, norms


def _published(run):
    """Word the published result of a run of the paper."""
    if run is None:
        return "nothing for this recipe"
    if run.published is None:
        return "no number" + (f" ({run.source})" if run.source else "")
    return f"{run.metric} {run.published} ({run.source})"


def summary(cfg, model, sizes, world_size, run=None):
    """Describe a run before it starts.

    Args:
        cfg (CfgNode): a resolved config.
        model (nn.Module): the model it builds, on any device.
        sizes (dict[str, int] or None): number of images by data set, for those that are known.
        world_size (int): number of processes.
        run (paper.Run or None): the run of the paper that it is.

    Returns:
        str: aligned lines, one subject each.
    """
    solver, sizes = cfg.SOLVER, sizes or {}
    batch = solver.IMS_PER_BATCH
    group = solver.IMS_PER_GROUP or max(1, batch // world_size)
    images = None
    if cfg.DATASETS.TRAIN and all(sizes.get(name) for name in cfg.DATASETS.TRAIN):
        images = sum(sizes[name] for name in cfg.DATASETS.TRAIN)

    def at(iteration):
        return f"{iteration:,}" + (f" (epoch {iteration * batch / images:.2f})" if images else "")

    def data(names):
        return ", ".join(f"{n} ({sizes[n]:,} images)" if n in sizes else n for n in names) or "none"

    scaling = "off"
    if solver.REFERENCE_WORLD_SIZE > 0:
        scaling = f"batch and rate fit {solver.REFERENCE_WORLD_SIZE} processes (SOLVER.REFERENCE_WORLD_SIZE)"
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = frozen_modules(model)
    size, kept = checkpoint_bytes(model), checkpoints_kept(cfg)
    policy = cfg.MODEL.INIT.POLICY or "as Detectron2's modules do"
    rows = [
        ("processes", f"{world_size} on {cfg.MODEL.DEVICE}"),
        ("linear scaling", scaling),
        (
            "batch",
            f"{batch} images: {batch // group} groups of {group}, {batch // group // world_size} per process",
        ),
        ("rate", f"{solver.BASE_LR:g}, x{solver.GAMMA:g} at {', '.join(map(at, solver.STEPS)) or 'no step'}"),
        (
            "warm-up",
            f"{solver.WARMUP_ITERS:,} iterations from x{solver.WARMUP_FACTOR:.4g} ({solver.WARMUP_METHOD})",
        ),
        ("length", f"{at(solver.MAX_ITER)}" + (f", schedule {solver.SCHEDULE}" if solver.SCHEDULE else "")),
        ("initialization", f"{policy}; weights: {cfg.MODEL.WEIGHTS or 'none'}; seed {cfg.SEED}"),
        ("parameters", f"{total:,}, of which {trained:,} train"),
        ("frozen", ", ".join(f"{name} ({n:,})" for name, n in frozen.items()) or "nothing"),
    ]
    for part, kinds in norms(model).items():
        rows.append((f"norm of {part}", ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))))
    rows += [
        ("train on", data(cfg.DATASETS.TRAIN)),
        ("test on", data(cfg.DATASETS.TEST)),
        ("published", _published(run)),
        ("checkpoints", f"{kept} of {size / 1e6:,.0f} MB, {kept * size / 1e9:,.1f} GB in {cfg.OUTPUT_DIR}"),
    ]
    width = max(len(label) for label, _ in rows) + 2
    return "\n".join(f"{label:<{width}}{text}" for label, text in rows)
