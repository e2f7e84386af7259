"""Interrupted and branched runs end with the weights of the run alone, bit for bit. On the toy model."""

import errno
import json
import os
import resource
import signal

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from toy import config, register_images

from rethink_d2 import recipe
from rethink_d2.engine import Trainer, checkpoint
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted, Preemption

LONG = ["SOLVER.SCHEDULE", "18", "SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.IMS_PER_GROUP", 2]
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    register_images("toy_resume", tmp_path_factory.mktemp("images"))
    yield "toy_resume"
    DatasetCatalog.remove("toy_resume")


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    Trainer(config(data, folder, *LONG)).train()
    return folder


def state(folder):
    """The final checkpoint without what differs between folders or in time."""
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    for name in TIMES:
        saved["scalars"].pop(name, None)
    return saved


def metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def assert_same_run(a, b):
    assert_equal(state(a), state(b))
    assert metrics(a) == metrics(b)


def assert_equal(a, b, where=""):
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


class StopsAfter(Preemption):
    """Asked to stop in a given iteration."""

    def __init__(self, count):
        super().__init__()
        self._left = count

    def __call__(self):
        self._left -= 1

    @property
    def requested(self):
        self._left -= 1
        return self._left < 0

    @requested.setter
    def requested(self, value):
        pass


@pytest.mark.parametrize("stops", [[1], [6], [18], [3, 5, 2]])
@pytest.mark.parametrize("workers", [0, 3])
def test_resumed_equals_unbroken(data, unbroken, tmp_path, stops, workers):
    cfg = config(data, tmp_path, *LONG, "DATALOADER.NUM_WORKERS", workers)
    for stop in stops:
        with pytest.raises(Preempted):
            Trainer(cfg, find_start(cfg, resume=True), StopsAfter(stop - 1)).train()
    Trainer(cfg, find_start(cfg, resume=True)).train()
    assert_same_run(tmp_path, unbroken)


def test_the_seed_decides(data, unbroken, tmp_path):
    Trainer(config(data, tmp_path, *LONG, "SEED", 2)).train()
    assert not torch.equal(
        state(tmp_path)["model"]["linear.weight"], state(unbroken)["model"]["linear.weight"]
    )


def test_writing_in_the_background_changes_nothing(data, unbroken, tmp_path):
    Trainer(config(data, tmp_path, *LONG, "SOLVER.CHECKPOINT_BACKGROUND", False)).train()
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("schedule", ["9", "12"])
def test_branch_equals_the_run_alone(data, unbroken, tmp_path, schedule):
    options = [*LONG, "SOLVER.SCHEDULE", schedule]
    alone, branch = config(data, tmp_path / "alone", *options), config(data, tmp_path / "branch", *options)
    Trainer(alone).train()
    start = find_start(branch, branch_from=str(unbroken))
    # The newest checkpoint before the shorter run's first drop.
    assert start.iteration == {"9": 3, "12": 7}[schedule]
    assert start.parent["iteration"] == start.iteration + 1
    Trainer(branch, start).train()
    assert_same_run(tmp_path / "branch", tmp_path / "alone")


@pytest.mark.parametrize(
    "change",
    [
        ("SEED", 2),
        ("SOLVER.BASE_LR", 0.2),
        ("SOLVER.IMS_PER_GROUP", 4),
        ("INPUT.MIN_SIZE_TRAIN", (16,)),
        ("INPUT.RANDOM_FLIP", "none"),
        ("SOLVER.WEIGHT_DECAY", 0.1),
        ("MODEL.WEIGHTS", "other.pth"),
    ],
    ids=lambda c: c[0],
)
def test_a_branch_of_another_run_is_refused_with_the_key(data, unbroken, tmp_path, change):
    cfg = config(data, tmp_path, *LONG, "SOLVER.SCHEDULE", "9", *change)
    with pytest.raises(ValueError, match=change[0]):
        find_start(cfg, branch_from=str(unbroken))
    assert find_start(cfg, branch_from=str(unbroken), allow=[change[0]]).kind == "branch"


def test_every_key_but_those_in_the_table_belongs_to_the_trajectory(data, tmp_path):
    assert recipe.classify("MODEL.SOMETHING_NEW") == "trajectory"
    for key in (*recipe.FREE, *recipe.SCHEDULE):
        assert key in recipe.flatten(config(data, tmp_path)), key


def test_a_longer_schedule_resumes_only_before_the_first_drop(data, tmp_path):
    cfg = config(data, tmp_path, *LONG)
    with pytest.raises(Preempted):
        Trainer(cfg, None, StopsAfter(4)).train()
    longer = config(data, tmp_path, *LONG, "SOLVER.SCHEDULE", "27")
    assert find_start(longer, resume=True).iteration == 4
    Trainer(cfg, find_start(cfg, resume=True)).train()
    with pytest.raises(ValueError, match="SOLVER.SCHEDULE.*agrees with the new one for 12 only"):
        find_start(longer, resume=True)


def test_an_existing_run_is_not_overwritten(data, unbroken):
    with pytest.raises(ValueError, match="18 iterations already; add --resume"):
        find_start(config(data, unbroken, *LONG))


def damage_tail(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [damage_tail, damage_byte, os.unlink], ids=lambda f: f.__name__)
def test_a_damaged_checkpoint_is_passed_over(data, unbroken, tmp_path, damage, caplog):
    cfg = config(data, tmp_path, *LONG)
    with pytest.raises(Preempted):
        Trainer(cfg, None, StopsAfter(9)).train()
    damage(tmp_path / "model_0000009.pth")
    start = find_start(cfg, resume=True)
    assert start.iteration == 7
    assert damage is os.unlink or "model_0000009.pth is damaged" in caplog.text
    Trainer(cfg, start).train()
    assert_same_run(tmp_path, unbroken)


def test_no_whole_checkpoint_is_an_error(data, tmp_path):
    cfg = config(data, tmp_path, *LONG)
    with pytest.raises(Preempted):
        Trainer(cfg, None, StopsAfter(1)).train()
    damage_tail(tmp_path / "model_0000001.pth")
    with pytest.raises(ValueError, match="none of its 1 checkpoints is whole"):
        find_start(cfg, resume=True)


def test_what_is_kept(data, tmp_path):
    keep = ["SOLVER.CHECKPOINT_KEEP", 2, "SOLVER.BRANCH_POINTS", (3, 10)]
    cfg = config(data, tmp_path, *LONG, *keep)
    with pytest.raises(Preempted):
        Trainer(cfg, None, StopsAfter(5)).train()
    Trainer(cfg, find_start(cfg, resume=True)).train()
    assert list(checkpoint.checkpoints(str(tmp_path))) == [17, 15, 9, 2]
    files = {p.name for p in tmp_path.glob("model_*")}
    assert files == {
        f"model_{n}.pth{s}"
        for n in ("0000017", "0000015", "0000009", "0000002", "final")
        for s in ("", ".sha256")
    }
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000017.pth"


@pytest.fixture
def full_disk():
    """No file may grow beyond a limit: what writing to a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, full_disk, background):
    store = checkpoint.CheckpointStore(str(tmp_path), background=background)
    store.save(1, {"model": {"w": torch.zeros(10)}})
    store.wait()
    full_disk(100_000)
    with pytest.raises(checkpoint.CheckpointError, match="model_0000002.pth.*SOLVER.CHECKPOINT_KEEP"):
        store.save(2, {"model": {"w": torch.zeros(100_000)}})
        store.wait()
    assert checkpoint.is_whole(str(tmp_path / "model_0000001.pth"))
    assert {p.name for p in tmp_path.iterdir()} == {
        "model_0000001.pth",
        "model_0000001.pth.sha256",
        "last_checkpoint",
    }


def test_training_goes_on_without_checkpoints_if_asked(tmp_path, full_disk, caplog):
    store = checkpoint.CheckpointStore(str(tmp_path), required=False)
    full_disk(100_000)
    store.save(2, {"model": {"w": torch.zeros(100_000)}})
    store.also(2, "model_best")
    assert caplog.text.count("could not be written") == 2
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_for_a_moment_costs_one_iteration(data, unbroken, tmp_path, monkeypatch):
    """In the background; not the time until the next checkpoint, nor the run."""
    write, tried = checkpoint.CheckpointStore._write_file, []

    def full_once(store, path, state):
        tried.append(state["iteration"])
        if len(tried) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(store, path, state)

    class Waits(HookBase):
        def after_step(self):
            if len(tried) == 1:
                trainer._store._pending.exception()  # until it has failed

    monkeypatch.setattr(checkpoint.CheckpointStore, "_write_file", full_once)
    trainer = Trainer(config(data, tmp_path, *LONG, "SOLVER.CHECKPOINT_BACKGROUND", True))
    trainer.register_hooks([Waits()])
    trainer.train()
    assert tried[:3] == [3, 4, 7]
    assert list(checkpoint.checkpoints(str(tmp_path))) == [17, 15, 11, 7, 4]
    assert_same_run(tmp_path, unbroken)


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    (tmp_path / ".writing-abc").write_bytes(b"half")
    checkpoint.CheckpointStore(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_detectron2_loads_the_weights(data, unbroken):
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    model = build_model(config(data, unbroken))
    DetectionCheckpointer(model).load(str(unbroken / "model_final.pth"))
    assert torch.equal(model.linear.weight, state(unbroken)["model"]["linear.weight"])
