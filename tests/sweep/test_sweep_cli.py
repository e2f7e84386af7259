import functools
import json

import pytest
import standin
from standin import node, starts

from rethink_d2 import model_zoo
from rethink_d2.sweep import __main__ as main
from rethink_d2.sweep.launch import LocalSweep
from rethink_d2.sweep.state import remember

MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """The command line on a plan of stand-ins; a function of the plan and the arguments."""
    monkeypatch.setattr(main, "LocalSweep", functools.partial(LocalSweep, command=standin.command, poll=0.01))
    reports = []
    monkeypatch.setattr(main, "write_report", lambda out: reports.append(out) or 0)

    def call(nodes, *args):
        monkeypatch.setattr(main, "plan", lambda out, **_: nodes)
        monkeypatch.setattr(main, "preflight", lambda *_, **__: [])
        call.reports = reports
        return main.cli([*args[:1], "--out", str(tmp_path), *args[1:]])

    return call


@pytest.mark.parametrize(
    "codes, expected, reported", [([], 0, True), ([1] * 9, 1, True), ([2], 1, True), ([75], 75, False)]
)
def test_run(cli, tmp_path, capsys, codes, expected, reported):
    nodes = [node("a/seed1", options=("CODES", codes)), node("b/seed1", ["a/seed1"])]
    assert cli(nodes, "run") == expected
    assert cli.reports == ([str(tmp_path)] if reported else [])
    said = capsys.readouterr().out
    assert ("All 2 runs are finished" in said) == (expected == 0)
    assert ("b/seed1  needs a/seed1" in said) == (expected != 0)
    assert main.cli(["status", str(tmp_path)]) == 0
    assert "a/seed1" in capsys.readouterr().out


def test_dry_run_launches_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    selection = ["--only", "base-r50-gn-*", "--schedules", "2x,3x", "--arm", "scratch", "--out", str(out)]
    assert main.cli(["run", "--dry-run", *selection]) == 0
    said = capsys.readouterr().out
    assert "base-r50-gn-scratch-2x/seed1  branch 120,000 -> 180,000\n-> report\n" in said
    assert main.cli(["plan", *selection]) == 0
    assert capsys.readouterr().out == said
    assert main.cli(["plan", "--dot", *selection]) == 0
    assert capsys.readouterr().out.startswith("digraph")
    assert not out.exists()


def test_lengths_may_be_separated_by_spaces_too(tmp_path, capsys):
    argv = ["plan", "--only", "base-r50-gn-scratch-*", "--out", str(tmp_path), "--schedules"]
    assert main.cli([*argv, "2x, 6x"]) == 0
    said = capsys.readouterr().out
    assert main.cli([*argv, "2x,6x"]) == 0
    assert capsys.readouterr().out == said


def test_a_slurm_without_gpus_is_planned_for_cpus(tmp_path, monkeypatch):
    """As the training finds it: SyncBN is another norm there."""
    found = []
    monkeypatch.setattr(main, "preflight", lambda out, nodes, **_: found.extend(nodes) or ["enough"])
    argv = ["run", "--mini", "--only", "base-r50-syncbn-scratch-2x", "--out", str(tmp_path)]
    slurm = ["--num-gpus", "2", "--launcher", "slurm", "--slurm", "gpus_per_node=0"]
    assert main.cli([*argv, *slurm]) == 2
    assert main.cli([*argv, "--num-gpus", "2", "MODEL.DEVICE", "cpu"]) == 2
    assert found[0].identity == found[1].identity


def test_options_for_all_runs_come_last(tmp_path, capsys):
    args = main.argument_parser().parse_args(["run", "--only", "vgg*", "SOLVER.AMP.ENABLED", "True"])
    assert all(n.options[:2] == ("SOLVER.AMP.ENABLED", "True") for n in main.make_plan(args, 1))


def test_costs_may_be_those_of_finished_runs(tmp_path):
    args = ["plan", "--only", "base-r50-gn-scratch-6x", "--out", str(tmp_path)]
    [made] = main.make_plan(main.argument_parser().parse_args(args), 1)
    folder = tmp_path / made.id
    folder.mkdir(parents=True)
    record = {"state": "done", "seconds": 3600, "world_size": 1, "identity": made.identity}
    record |= {"threads": 1, "hardware": "1 x V100"}
    (folder / "run.json").write_text(json.dumps(record))
    [measured] = main.make_plan(main.argument_parser().parse_args([*args, "--measured"]), 1)
    assert measured.gpu_hours == pytest.approx(1)


def test_problems_are_printed_together_and_nothing_starts(tmp_path, monkeypatch, capsys):
    nodes = [node("a/seed1", config_file=MINI, options=("SOLVER.X", 1)), node("b/seed1", options=("Y", 1))]
    monkeypatch.setattr(main, "plan", lambda out, **_: nodes)
    assert main.cli(["run", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "SOLVER.X" in said and "Y is not" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "args, text",
    [
        (["run", "--only", "nosuch"], "--only nosuch"),
        (["plan", "--one-x", "54"], "--one-x: only with --mini"),
        (["plan", "--mini", "--one-x", "0"], "SOLVER.ONE_X: 0 is not positive"),
        (["run", "--slurm", "a=b"], "only with --launcher slurm"),
        (["run", "--launcher", "slurm", "--slurm", "a"], "--slurm a: write KEY=VALUE"),
        (["run", "--launcher", "slurm", "--parallel", "2"], "--parallel"),
        (["run", "--launcher", "slurm", "--slurm", "time=24:00:00"], "--slurm time=24:00:00: give hours"),
        (["plan", "--num-gpus", "0"], "--num-gpus 0: at least 1"),
        (["run", "--num-gpus", "-1"], "--num-gpus -1: at least 1"),
        (["run", "--parallel", "-1"], "--parallel -1: at least 1"),
        (["plan", "--schedules", ""], "--schedules '': no run"),
        (["plan", "--schedules", "2x,"], "--schedules '': no run"),
        (["status", "nosuch"], "no sweep's folder"),
        (["stop", "a/seed1", "--out", "nosuch"], "no sweep's folder"),
    ],
)
def test_wrong_arguments_are_refused(capsys, args, text):
    assert main.cli(args) == 2
    assert text in capsys.readouterr().err


def test_stop_says_what_does_not_run(cli, tmp_path, capsys):
    cli([node("a/seed1")], "run")
    assert main.cli(["stop", "a/seed1", "--out", str(tmp_path)]) == 1
    assert "a/seed1 does not run" in capsys.readouterr().err
    assert main.cli(["stop", "nosuch", "--out", str(tmp_path)]) == 2
    assert main.cli(["stop", "base-r50-*", "--out", str(tmp_path)]) == 1  # by the run's id
    assert len(starts(tmp_path, "a/seed1")) == 1


def test_what_waits_is_held_back_from_the_sweeps_under_way(cli, tmp_path, capsys, monkeypatch):
    nodes = [node("a/seed1"), node("b/seed1", ["a/seed1"])]
    assert cli(nodes[:1], "run") == 0
    remember(str(tmp_path), nodes)
    assert main.cli(["stop", "?/seed1", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "b/seed1: does not run; sweeps that are under way" in said.out
    assert "a/seed1 does not run" in said.err and "b/seed1" not in said.err
    with monkeypatch.context() as patch:
        patch.setattr("rethink_d2.sweep.launch.forget_stop", lambda folder: None)  # as one that has begun
        assert cli(nodes, "run") == 75
    assert starts(tmp_path, "b/seed1") == []
    assert cli(nodes, "run") == 0  # a later one
