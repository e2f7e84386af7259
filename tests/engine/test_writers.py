"""LOG.WRITERS: TensorBoard by default, Weights & Biases through a stand-in that records what it is sent."""

import importlib.machinery
import json
import sys
import types

import pytest
from detectron2.data import DatasetCatalog
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from toy import config, register_images

from rethink_d2 import recipe
from rethink_d2.checks import training
from rethink_d2.engine import Trainer
from rethink_d2.engine.start import find_start
from rethink_d2.engine.writers import WandbWriter, build_writers
from rethink_d2.preemption import Preempted, Preemption

LENGTH = ["SOLVER.SCHEDULE", "44", "SOLVER.CHECKPOINT_PERIOD", 10]
WANDB = ["LOG.WRITERS", ("wandb",)]
TIMES = ("time", "data_time", "rank_data_time", "eta_seconds")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    register_images("toy_writers", tmp_path_factory.mktemp("images"))
    yield "toy_writers"
    DatasetCatalog.remove("toy_writers")


class Run:
    """One run on W&B's side, and the processes that have written to it."""

    def __init__(self):
        self.rows, self.summary, self.config, self.ends = [], {}, {}, []
        self.resumed, self.preempting, self.broken = False, False, None

    @property
    def step(self):
        return self.rows[-1][0] + 1 if self.rows else 0

    def log(self, row, step):
        if self.broken:
            raise self.broken
        self.rows.append((step, dict(row)))

    def mark_preempting(self):
        self.preempting = True

    def finish(self, exit_code):
        self.ends.append((self.summary["state"], exit_code))


@pytest.fixture
def wandb(monkeypatch):
    """A module in wandb's place: ``runs`` by id, and ``refuses``, what init raises."""

    class Error(Exception):
        pass

    def init(id, config, resume, **settings):
        if module.refuses:
            raise Error(module.refuses)
        run = module.runs.get(id)
        assert run is None or resume == "allow"
        module.runs[id] = run = run or Run()
        run.resumed, run.settings = run.step > 0, settings
        run.config.update(config)
        return run

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init, module.runs, module.refuses = init, {}, ""
    module.errors = types.SimpleNamespace(Error=Error)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


class StopAt(Preemption):
    """Asked to stop at the end of an iteration."""

    def __init__(self, iteration):
        super().__init__()
        self.left = iteration

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0

    @requested.setter
    def requested(self, value):
        pass


def without_times(row):
    return {name: value for name, value in row.items() if name not in (*TIMES, "iteration")}


def rows_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [(row["iteration"], without_times(row)) for row in rows]


def test_tensorboard_alone_by_default(data, tmp_path, wandb):
    Trainer(config(data, tmp_path)).train()
    assert list(tmp_path.glob("events.out.tfevents.*"))
    assert not wandb.runs


def test_none(data, tmp_path):
    Trainer(config(data, tmp_path, "LOG.WRITERS", ())).train()
    assert not list(tmp_path.glob("events.out.tfevents.*"))
    assert (tmp_path / "metrics.json").is_file()


def test_wandb_gets_what_metrics_json_gets(data, tmp_path, wandb):
    folder = tmp_path / "base-scratch-6x" / "seed1"
    cfg = config(data, folder, *LENGTH, *WANDB)
    Trainer(cfg).train()
    (name, run), *others = wandb.runs.items()
    assert not others
    assert name == f"{recipe.identity(cfg)[:32]}-seed1"
    assert [(step, without_times(row)) for step, row in run.rows] == rows_of(folder)
    assert [step for step, _ in run.rows] == [19, 39, 43]
    assert run.config["SOLVER"]["MAX_ITER"] == 44 and run.config["identity"] == recipe.identity(cfg)
    assert json.dumps(run.config)
    assert run.settings["name"] == "base-scratch-6x/seed1" and run.settings["dir"] == cfg.OUTPUT_DIR
    assert run.ends == [("done", 0)]


@pytest.mark.parametrize("stops", [[5], [19], [25], [30, 4]])
def test_a_resumed_run_continues_its_wandb_run(data, tmp_path, wandb, stops):
    cfg = config(data, tmp_path, *LENGTH, *WANDB)
    for stop in stops:
        with pytest.raises(Preempted):
            Trainer(cfg, find_start(cfg, resume=True), StopAt(stop)).train()
        (run,) = wandb.runs.values()
        assert run.preempting
    Trainer(cfg, find_start(cfg, resume=True)).train()
    (run,) = wandb.runs.values()
    assert [(step, without_times(row)) for step, row in run.rows] == rows_of(tmp_path)
    assert run.ends == [("preempted", 75)] * len(stops) + [("done", 0)]


def test_after_a_kill_nothing_is_sent_twice(data, tmp_path, wandb):
    cfg = config(data, tmp_path, *LENGTH, *WANDB, "SOLVER.CHECKPOINT_PERIOD", 30)
    with pytest.raises(Preempted):
        Trainer(cfg, preemption=StopAt(41)).train()
    for path in tmp_path.glob("model_000004*"):
        path.unlink()
    Trainer(cfg, find_start(cfg, resume=True)).train()  # from iteration 30; W&B has 39
    (run,) = wandb.runs.values()
    assert [step for step, _ in run.rows] == [19, 39, 43]


def test_a_failed_run_says_so(data, tmp_path, wandb):
    trainer = Trainer(config(data, tmp_path, *WANDB))
    trainer.model.noise = float("nan")
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert next(iter(wandb.runs.values())).ends == [("failed", 1)]


def test_a_lost_connection_does_not_end_the_training(data, tmp_path, wandb, caplog):
    trainer = Trainer(config(data, tmp_path, *LENGTH, *WANDB))
    (run,) = wandb.runs.values()
    run.broken = ConnectionResetError("Connection lost")
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()
    assert caplog.text.count("Nothing more is sent to Weights & Biases") == 1
    assert not run.ends


def test_the_id_is_the_runs(data, tmp_path, wandb):
    for folder, options in (("a", []), ("b", []), ("c", ["SEED", 2]), ("d", ["SOLVER.BASE_LR", 0.2])):
        WandbWriter(config(data, tmp_path / folder, *WANDB, *options))
    assert len(wandb.runs) == 3


def test_only_the_main_process_writes(data, tmp_path, wandb, monkeypatch):
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    Trainer(config(data, tmp_path, "LOG.WRITERS", ("tensorboard", "wandb"))).train()
    assert not wandb.runs
    assert not list(tmp_path.glob("events.out.tfevents.*"))


def test_what_cannot_be_built_names_the_key(data, tmp_path, wandb, monkeypatch):
    with pytest.raises(ValueError, match="LOG.WRITERS: 'wandbb' is not one of"):
        build_writers(config(data, tmp_path, "LOG.WRITERS", ("wandbb",)))
    wandb.refuses = "api_key not configured"
    with pytest.raises(ValueError, match="LOG.WRITERS: .*api_key not configured.*WANDB_MODE=offline"):
        build_writers(config(data, tmp_path, *WANDB))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="LOG.WRITERS: .*pip install wandb"):
        build_writers(config(data, tmp_path, *WANDB))


def problems(cfg):
    return [str(p) for p in recipe.check(cfg) if p.key == "LOG.WRITERS"]


def test_the_check_refuses_what_cannot_be_built(data, tmp_path, wandb, monkeypatch):
    assert not problems(config(data, tmp_path, "LOG.WRITERS", tuple(training.WRITERS)))
    assert not problems(config(data, tmp_path, "LOG.WRITERS", ()))
    (problem,) = problems(config(data, tmp_path, "LOG.WRITERS", ("tensorbord",)))
    assert "did you mean tensorboard?" in problem
    (problem,) = problems(config(data, tmp_path, *WANDB, "VIS_PERIOD", 20))
    assert "VIS_PERIOD" in problem
    monkeypatch.setitem(sys.modules, "wandb", None)
    (problem,) = problems(config(data, tmp_path, *WANDB))
    assert "pip install wandb" in problem


def test_the_check_and_the_builder_know_the_same_names(data, tmp_path, wandb):
    cfg = config(data, tmp_path, "LOG.WRITERS", tuple(training.WRITERS))
    assert [type(w) for w in build_writers(cfg)] == [TensorboardXWriter, WandbWriter]


def test_writers_do_not_change_the_run():
    assert recipe.classify("LOG.WRITERS") == "free"
