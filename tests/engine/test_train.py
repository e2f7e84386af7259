"""train_net.py from the outside: real processes, real files, built-in data."""

import json
import math
import shutil
import sys

import pytest
import torch

from rethink_d2 import model_zoo

MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")
TINY = [
    *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "('glyphs_tiny_val',)"),
    *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.01", "DATALOADER.NUM_WORKERS", "0"),
]
SHORT = ["SOLVER.SCHEDULE", "6", "TEST.EVAL_PERIOD", "3", "SOLVER.CHECKPOINT_PERIOD", "3"]


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(run_train, tmp_path_factory):
    """A run of six iterations, from an empty folder."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    done = run_train("--config-file", MINI, *TINY, *SHORT, "OUTPUT_DIR", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_leaves_its_record(finished):
    record = json.loads((finished / "run.json").read_text())
    assert record["state"] == "done" and record["last_error"] is None
    assert record["world_size"] == 1 and record["seed"] == 1 and len(record["identity"]) == 64
    results = json.loads((finished / "results.json").read_text())
    assert [(r["iteration"], r["dataset"]) for r in results] == [
        (3, "glyphs_tiny_val"),
        (6, "glyphs_tiny_val"),
    ]
    assert {"bbox/AP", "segm/AP75"} <= set(results[0])
    losses = [row["total_loss"] for row in rows(finished / "metrics.json") if "total_loss" in row]
    assert losses and all(map(math.isfinite, losses))
    assert list(finished.glob("events.out.tfevents*"))
    log = (finished / "log.txt").read_text()
    assert "iter 6/6" in log and "iter 7/6" not in log and "epoch" in log and "CPU" in log


def test_evaluation_alone_repeats_the_training_runs_numbers(finished, run_train, tmp_path):
    weights = finished / "model_final.pth"
    done = run_train(
        "--eval-only", "--config-file", MINI, *TINY, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path
    )
    assert done.returncode == 0, done.stderr
    (alone,) = json.loads((tmp_path / "results.json").read_text())
    during = json.loads((finished / "results.json").read_text())[-1]
    assert alone["iteration"] == 6
    assert alone == pytest.approx(during)


def test_evaluation_in_a_run_s_folder_leaves_its_record_as_it_is(finished, run_train, tmp_path, capsys):
    from rethink_d2.train import cli

    names = ("config.yaml", "run.json", "results.json")
    before = {name: (finished / name).read_text() for name in names}
    here = ["--eval-only", "--config-file", MINI, *TINY, *SHORT, "OUTPUT_DIR", str(finished)]
    own, other = finished / "model_final.pth", tmp_path / "other.pth"
    shutil.copy(own, other)
    for options, words in (
        ([], "--resume"),
        (["MODEL.WEIGHTS", str(other)], "set another OUTPUT_DIR"),
        (["MODEL.WEIGHTS", str(own), "MODEL.ROI_HEADS.NMS_THRESH_TEST", "0.1"], "NMS_THRESH_TEST"),
    ):
        assert cli([*here, *options]) == 2
        assert words in capsys.readouterr().err
    done = run_train("--resume", *here, "SOLVER.SCHEDULE", "7")
    assert done.returncode == 0, done.stderr
    assert {name: (finished / name).read_text() for name in names} == before


def test_evaluation_needs_weights(capsys, tmp_path):
    from rethink_d2.train import cli

    assert cli(["--eval-only", "--config-file", MINI, *TINY, "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert "MODEL.WEIGHTS" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_resume_repeats_what_was_lost(finished, run_train):
    before = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    rows_before = (finished / "results.json").read_text()
    for name in ("model_0000005.pth", "model_final.pth"):
        (finished / name).unlink()
    done = run_train("--resume", "--config-file", MINI, *TINY, *SHORT, "OUTPUT_DIR", finished)
    assert done.returncode == 0, done.stderr
    assert "Starting training from iteration 3" in done.stdout
    after = torch.load(finished / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (finished / "results.json").read_text() == rows_before


def test_another_run_is_not_overwritten(finished, capsys):
    from rethink_d2.train import cli

    assert cli(["--config-file", MINI, *TINY, *SHORT, "OUTPUT_DIR", str(finished)]) == 2
    assert "add --resume" in capsys.readouterr().err


def test_dry_run_prints_the_recipe_and_writes_nothing(run_train, tmp_path):
    config = model_zoo.get_config_file("scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml")
    done = run_train("--config-file", config, "--dry-run", "OUTPUT_DIR", tmp_path / "out", cwd=tmp_path)
    assert not list(tmp_path.iterdir()), done.stdout
    for expected in ("480,000", "520,000", "540,000", "0.02", "41.3", "msra", "53 GN", "frozen", "nothing"):
        assert expected in done.stdout, expected


def test_a_dry_run_may_be_of_a_larger_machine(capsys, tmp_path):
    from rethink_d2.train import cli

    config = model_zoo.get_config_file("scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml")
    opts = ["DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "()", "OUTPUT_DIR", str(tmp_path)]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "20"]
    assert cli(["--dry-run", "--num-gpus", "8", "--config-file", config, *opts]) == 0
    assert "8 on cuda" in capsys.readouterr().out


def test_a_dry_run_of_no_model_says_what_is_wrong_alone(capsys):
    from rethink_d2.train import cli

    for options, words in (
        (["MODEL.RESNETS.DEPTH", "51"], "51"),
        (["MODEL.FPN.IN_FEATURES", "[]"], "AssertionError in"),
    ):
        assert cli(["--dry-run", "--config-file", MINI, *options]) == 2
        said = capsys.readouterr()
        assert words in said.err and "cannot be built" in said.err and not said.out


@pytest.mark.parametrize("args", [("--num-gpus", "0"), ("--config-file", "/")])
def test_wrong_arguments_are_named(args, capsys):
    from rethink_d2.train import cli

    assert cli(["--dry-run", "--config-file", MINI, *args]) == 2
    assert args[-1] in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, words",
    [
        (["SOLVER.SCHEDULE", "6y"], "SOLVER.SCHEDULE"),
        (["SOLVER.BASE_RL", "0.1"], "SOLVER.BASE_LR"),
        (["SOLVER.MAX_ITER", "10"], "SOLVER.SCHEDULE"),
        (["MODEL.BACKBONE.FREEZE_AT", "2"], "MODEL.BACKBONE.FREEZE_AT"),
        (["DATASETS.TRAIN", "('glyphs_trian',)"], "glyphs_train"),
    ],
)
def test_refusals_name_the_cure_and_leave_nothing(options, words, capsys, tmp_path):
    from rethink_d2.train import cli

    assert cli(["--config-file", MINI, *options, "OUTPUT_DIR", str(tmp_path / "out")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_several_processes_without_gpu_need_to_be_asked_for(capsys):
    from rethink_d2.train import cli

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert cli(["--config-file", MINI, "--num-gpus", "2"]) == 2
    assert "MODEL.DEVICE cpu" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("way", ["launch", "torchrun"])
def test_two_cpu_processes(run_train, tmp_path, way):
    options = [
        "SOLVER.SCHEDULE",
        "4",
        "SOLVER.IMS_PER_GROUP",
        "1",
        "MODEL.DEVICE",
        "cpu",
        "OUTPUT_DIR",
        tmp_path,
    ]
    if way == "launch":
        done = run_train("--num-gpus", "2", "--config-file", MINI, *TINY, *options)
    else:
        torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
        done = run_train("--config-file", MINI, *TINY, *options, prefix=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "run.json").read_text())["world_size"] == 2


@pytest.mark.slow
def test_the_papers_config_on_genuine_coco(run_train, real_data, tmp_path):
    config = model_zoo.get_config_file("scratch/scratch_mask_rcnn_R_50_FPN_gn_6x.yaml")
    options = [
        *("INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.SCHEDULE", "3"),
        *("MODEL.RPN.POST_NMS_TOPK_TEST", "30"),  # 1000 take a CPU seconds per image
        *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.BASE_LR", "0.0025", "OUTPUT_DIR", str(tmp_path)),
    ]
    done = run_train("--config-file", config, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = json.loads((tmp_path / "results.json").read_text())
    assert result["dataset"] == "coco_2017_val" and result["iteration"] == 3
    assert "crowd regions" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_the_mini_model_on_genuine_voc(run_train, real_data, tmp_path):
    config = model_zoo.get_config_file("mini/scratch_faster_rcnn_R_18_FPN_gn_voc.yaml")
    done = run_train("--config-file", config, "SOLVER.SCHEDULE", "4", "OUTPUT_DIR", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "bbox/AP50" in json.loads((tmp_path / "results.json").read_text())[0]
