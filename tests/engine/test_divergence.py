"""Updates that are not finite: the run stops and says why, or leaves a few of them out."""

import json
import math

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from gloo import on_processes
from poison import KINDS, States, poison
from test_resume import StopsAfter, assert_equal, assert_same_run
from toy import config, register_images

from rethink_d2.engine import Trainer
from rethink_d2.engine.divergence import Diverged, gradient_norm, report
from rethink_d2.engine.start import find_start
from rethink_d2.preemption import Preempted

EVERY_3 = ["SOLVER.SCHEDULE", "9", "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.IMS_PER_GROUP", 2]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    yield register_images("toy_divergence", tmp_path_factory.mktemp("images"))
    DatasetCatalog.remove("toy_divergence")


def toy(folder, *options):
    return config("toy_divergence", folder, *EVERY_3, *options)


def poisoned(cfg, iterations, kind="nan loss", preemption=None):
    trainer = Trainer(cfg, find_start(cfg, resume=True), preemption)
    poison(trainer, iterations, kind)
    return trainer


def written(folder):
    return json.loads((folder / "divergence.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_the_run_stops_with_a_report(records, tmp_path, kind):
    trainer, batch = poisoned(toy(tmp_path), [5], kind), []
    trainer.model.register_forward_pre_hook(
        lambda _, args: batch.extend(s["file_name"] for s in args[0]) if trainer.iter == 5 else None
    )
    with pytest.raises(Diverged) as stopped:
        trainer.train()
    found = written(tmp_path)
    assert found["iteration"] == 5 and found["skipped_before"] == 0
    assert found["rate"] == pytest.approx(0.1)
    (losses,) = found["losses"]
    assert math.isfinite(float(losses["loss_toy"])) == kind.endswith("gradient")
    assert not math.isfinite(float(found["gradient_norm"]))
    assert found["files"] == batch and len(batch) == 4
    assert found["last_checkpoint"] == str(tmp_path / "model_0000002.pth")
    assert "SOLVER.BASE_LR 0.1" in found["likely_causes"][0]
    for words in ("iteration 5", "SOLVER.BASE_LR", "model_0000002.pth", "divergence.json"):
        assert words in str(stopped.value), words


def test_a_rate_that_is_too_high_does_diverge(records, tmp_path):
    cfg = toy(tmp_path, "SOLVER.BASE_LR", 1e15, "SOLVER.WARMUP_ITERS", 0)
    with pytest.raises(Diverged, match="SOLVER.BASE_LR 1e[+]15 is high for SOLVER.IMS_PER_BATCH 4"):
        Trainer(cfg).train()
    assert written(tmp_path)["last_checkpoint"] is None


def sample(name, *boxes):
    instances = Instances((32, 32), gt_boxes=Boxes(torch.tensor(boxes).reshape(-1, 4)))
    return {"file_name": name, "instances": instances}


def causes(folder, samples, *options, iteration=10**6):
    report(toy(folder, *options), iteration, losses={}, norm=1.0, rate=0.1, samples=samples, skipped=0)
    return written(folder)["likely_causes"]


@pytest.mark.parametrize("box", [[5.0, 5.0, 5.0, 9.0], [5.0, 9.0, 8.0, 7.0], [1.0, 1.0, math.nan, 9.0]])
def test_a_bad_box_is_the_first_suspect(tmp_path, box):
    good = [1.0, 1.0, 9.0, 9.0]
    samples = [sample("good.jpg", good), sample("none.jpg"), sample("bad.jpg", good, box), {"file_name": "x"}]
    assert causes(tmp_path, samples)[0].startswith("bad.jpg has boxes without an area")


def test_what_does_not_fit_is_not_suspected(tmp_path):
    usual = ["SOLVER.BASE_LR", 0.005]
    assert causes(tmp_path, [], *usual)[0].startswith("unknown")
    assert "SOLVER.WARMUP_ITERS" in causes(tmp_path, [], *usual, iteration=30)[0]
    assert "SOLVER.AMP.ENABLED" in causes(tmp_path, [], *usual, "SOLVER.AMP.ENABLED", True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_updates_may_be_left_out(records, tmp_path, kind):
    trainer, states = poisoned(toy(tmp_path, "SOLVER.SKIP_NONFINITE", 2), [2, 5, 6], kind), States()
    trainer.register_hooks([states])
    with pytest.raises(Diverged):
        trainer.train()
    assert written(tmp_path)["iteration"] == 6 and written(tmp_path)["skipped_before"] == 2
    for iteration in range(6):
        before, after = states.done[iteration]["linear.weight"], states.done[iteration + 1]["linear.weight"]
        if iteration in (2, 5):
            assert_equal(after, before)
        else:
            assert not torch.equal(after["weight"], before["weight"])
            assert not torch.equal(after["momentum_buffer"], before.get("momentum_buffer", torch.zeros(1)))


def test_as_many_as_may_be_left_out_end_well(records, tmp_path):
    trainer = poisoned(toy(tmp_path, "SOLVER.SKIP_NONFINITE", 2), [0, 8])
    trainer.train()
    assert trainer.skipped == 2
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_the_count_survives_an_interruption(records, tmp_path):
    bad = [1, 4, 6]
    cfg = toy(tmp_path / "stops", "SOLVER.SKIP_NONFINITE", 2)
    with pytest.raises(Preempted):
        poisoned(cfg, bad, preemption=StopsAfter(4)).train()
    with pytest.raises(Diverged, match="iteration 6"):
        poisoned(cfg, bad).train()
    assert written(tmp_path / "stops")["skipped_before"] == 2
    options = ["SOLVER.SKIP_NONFINITE", 3]
    poisoned(toy(tmp_path / "unbroken", *options), bad).train()
    for stop in (3, 1):
        with pytest.raises(Preempted):
            poisoned(toy(tmp_path / "run", *options), bad, preemption=StopsAfter(stop)).train()
    poisoned(toy(tmp_path / "run", *options), bad).train()
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


class Norms(HookBase):
    """The norms of the gradients, from their definition."""

    def before_train(self):
        self.values = []

    def after_backward(self):
        gradients = [p.grad.double().flatten() for p in self.trainer.model.parameters()]
        self.values.append(float(torch.cat(gradients).square().sum().sqrt()))


def test_the_gradients_norm_is_logged(records, tmp_path):
    norms = Norms()
    trainer = Trainer(toy(tmp_path))
    trainer.register_hooks([norms])
    trainer.train()
    logged = [value for value, _ in trainer.storage.history("gradient_norm").values()]
    assert logged == pytest.approx(norms.values) and len(logged) == 9
    (row,) = map(json.loads, (tmp_path / "metrics.json").read_text().splitlines())
    assert row["gradient_norm"] == pytest.approx(sorted(norms.values)[4]), "the median, as of all losses"


def test_frozen_parameters_have_no_part_in_the_norm():
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert gradient_norm(model) == 5


# With float16 the other process has nothing to object to: its loss is finite, its gradient may overflow.
ON_ONE = {
    "loss": ("nan loss", []),
    "gradient": ("nan gradient", []),
    "half": ("nan loss", ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "float16"]),
}


def poisoned_on_one(records, folder):
    """Two processes, of which the last one alone meets what is not finite."""
    DatasetCatalog.register("toy_divergence", lambda: records)
    last = comm.get_rank() == comm.get_world_size() - 1
    messages, states = {}, {}
    for name, (kind, options) in ON_ONE.items():
        trainer, kept = Trainer(toy(folder / name, "SOLVER.SKIP_NONFINITE", 1, *options)), States()
        trainer.register_hooks([kept])
        poison(trainer, [5, 7] if last else [], kind)
        try:
            trainer.train()
        except Diverged as e:
            messages[name], states[name] = str(e), kept.done
    return messages, states


def test_what_one_process_meets_counts_for_all(records, tmp_path):
    (messages, states), (others, theirs) = on_processes(
        tmp_path / "processes", 2, poisoned_on_one, records, tmp_path
    )
    assert set(messages) == set(others) == set(ON_ONE), "both stop"
    assert_equal(states, theirs)
    for name, message in messages.items():
        assert "iteration 7" in message
        found = written(tmp_path / name)
        assert found["skipped_before"] == 1 and len(found["files"]) == 4
        finite = [math.isfinite(float(losses["loss_toy"])) for losses in found["losses"]]
        assert finite == [True, name == "gradient"]
        assert_equal(states[name][6], states[name][5])
        weights = [states[name][done]["module.linear.weight"]["weight"] for done in (6, 7)]
        assert not torch.equal(*weights)
