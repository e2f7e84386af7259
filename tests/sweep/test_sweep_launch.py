"""The local launcher, with stand-ins for trainings and real processes for sweeps."""

import contextlib
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import standin
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from standin import node, starts, sweep, until

from rethink_d2.sweep import launch
from rethink_d2.sweep.process import RETRIES, current, lock, stop
from rethink_d2.sweep.state import State, held, node_state

SLOW = ("SECONDS", 60)


@contextlib.contextmanager
def sweeping(out, nodes, **kwargs):
    """A sweep in a process of its own; whatever is left of it at the end is killed."""
    process = multiprocessing.get_context("fork").Process(
        target=lambda: sys.exit(launch.summary(out, nodes, sweep(out, nodes, **kwargs))[1])
    )
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()
        for n in nodes:
            for pid in starts(out, n.id):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def ids(names):
    return [f"{name}/seed1" for name in names]


def test_runs_each_after_its_parents(tmp_path):
    a, b, c = ids("abc")
    nodes = [node(a, options=("SECONDS", 0.1)), node(b, [a]), node(c, [b])]
    codes = []
    assert set(sweep(tmp_path, nodes, codes, parallel=3).values()) == {State.FINISHED}
    assert codes == [0]
    done = [os.path.getmtime(tmp_path / id / "run.json") for id in (a, b, c)]
    assert done == sorted(done)


def test_finished_runs_are_not_run_again_also_after_a_move(tmp_path):
    nodes = [node("a/seed1"), node("b/seed1", ["a/seed1"])]
    sweep(tmp_path / "out", nodes)
    os.rename(tmp_path / "out", tmp_path / "moved")
    assert set(sweep(tmp_path / "moved", nodes).values()) == {State.FINISHED}
    assert all(len(starts(tmp_path / "moved", n.id)) == 1 for n in nodes)


def test_another_recipes_folder_is_left_alone(tmp_path):
    sweep(tmp_path, [node("a/seed1")])
    codes = []
    nodes = [node("a/seed1", identity="new"), node("b/seed1", ["a/seed1"])]
    outcome = sweep(tmp_path, nodes, codes)
    assert outcome == {"a/seed1": State.CHANGED, "b/seed1": "needs a/seed1"}
    assert codes == [1]
    assert len(starts(tmp_path, "a/seed1")) == 1


def test_a_failure_stops_only_what_depends_on_it(tmp_path, capsys):
    a, b, c, d = ids("abcd")
    nodes = [node(a, options=("CODES", [1] * 9)), node(b, [a]), node(c, [b]), node(d)]
    codes = []
    outcome = sweep(tmp_path, nodes, codes)
    assert outcome == {a: State.FAILED, b: f"needs {a}", c: f"needs {b}", d: State.FINISHED}
    assert codes == [1]
    assert len(starts(tmp_path, a)) == 1 + RETRIES
    assert "3 of 4 runs are missing" in (said := capsys.readouterr().out)
    assert "and more" in said and "launch.log" in said


@pytest.mark.parametrize(
    "options, count, state",
    [
        (("CODES", [1, -9]), 3, State.FINISHED),
        (("CODES", [2] * 9), 1, State.FAILED),
        (("CODES", [1] * 9, "ERROR", "Diverged: the loss is nan"), 1, State.FAILED),
        (("CODES", [75] * 9), 1, State.PREEMPTED),
        (("CODES", [-15] * 9), 1, State.PREEMPTED),  # stopped before it listens to signals
    ],
)
def test_only_crashes_are_tried_again(tmp_path, options, count, state):
    assert sweep(tmp_path, [node("a/seed1", options=options)]) == {"a/seed1": state}
    assert len(starts(tmp_path, "a/seed1")) == count
    assert sweep(tmp_path, [node("a/seed1")]) == {"a/seed1": State.FINISHED}  # later, with the cause gone


@pytest.mark.parametrize("gain, count, state", [(20, 6, State.FINISHED), (0, 3, State.FAILED)])
def test_retries_are_counted_anew_from_each_checkpoint_on(tmp_path, gain, count, state):
    """A run that gets on is not given up because of five accidents in a month."""
    options = ("CODES", [-9] * 5, "GAIN", gain)
    assert sweep(tmp_path, [node("a/seed1", options=options)]) == {"a/seed1": state}
    assert len(starts(tmp_path, "a/seed1")) == count


def test_what_has_finished_is_not_missing_though_its_parent_fails(tmp_path):
    """As after another plan, in which it had no parent, or another one."""
    a, b, c = ids("abc")
    sweep(tmp_path, [node(b)])
    nodes = [node(a, options=("CODES", [2])), node(b, [a]), node(c, [b])]
    assert sweep(tmp_path, nodes) == {a: State.FAILED, b: State.FINISHED, c: State.FINISHED}
    assert len(starts(tmp_path, b)) == 1


def test_exit_code_0_without_a_result_is_a_failure(tmp_path):
    nodes = [node("a/seed1", kind="evaluate")]  # the stand-in leaves no results.json
    assert sweep(tmp_path, nodes) == {"a/seed1": State.FAILED}


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_plan_runs_what_can_run(tmp_path, data):
    count = data.draw(st.integers(1, 4))
    edges = [data.draw(st.sets(st.integers(0, i - 1), max_size=2)) if i else set() for i in range(count)]
    fails = data.draw(st.sets(st.integers(0, count - 1), max_size=2))
    names = [f"{i}/seed1" for i in range(count)]
    nodes = [
        node(names[i], [names[p] for p in edges[i]], options=("CODES", [2] if i in fails else []))
        for i in range(count)
    ]
    out = tmp_path / str(len(os.listdir(tmp_path)))
    outcome = sweep(out, nodes, parallel=2)
    can = set()
    for i in range(count):
        if edges[i] <= can:
            assert len(starts(out, names[i])) == 1
            assert outcome[names[i]] is (State.FAILED if i in fails else State.FINISHED)
            can |= {i} - fails
        else:
            assert not starts(out, names[i])
            assert outcome[names[i]].startswith("needs")


def test_as_many_side_by_side_as_asked_for(tmp_path):
    nodes = [node(id, options=SLOW) for id in ids("abc")]
    with sweeping(tmp_path, nodes, parallel=2):
        until(lambda: sum(node_state(tmp_path, n) is State.RUNNING for n in nodes) == 2)
        until(lambda: sum(bool(starts(tmp_path, n.id)) for n in nodes) == 2)
        assert node_state(tmp_path, nodes[2]) is State.WAITING
        # Each has cores of its own, where there are enough.
        cores = [os.sched_getaffinity(starts(tmp_path, n.id)[0]) for n in nodes[:2]]
        assert len(os.sched_getaffinity(0)) == 1 or not cores[0] & cores[1]


def test_gpus_are_divided_into_slots(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7,9")
    found = [(names, env["CUDA_VISIBLE_DEVICES"]) for names, env, _ in launch.slots(2)]
    assert found == [(["4", "5"], "4,5"), (["6", "7"], "6,7")]
    assert len(launch.slots(1, parallel=3)) == 3
    assert launch.slots(8) == []


def test_sigterm_preempts_and_the_next_sweep_goes_on(tmp_path):
    nodes = [node("a/seed1", options=SLOW), node("b/seed1", ["a/seed1"])]
    with sweeping(tmp_path, nodes) as first:
        until(lambda: starts(tmp_path, "a/seed1"))
        until(
            lambda: (
                node_state(tmp_path, nodes[0]) is State.RUNNING and (tmp_path / "a/seed1/run.json").exists()
            )
        )
        first.terminate()
        first.join(60)
        assert first.exitcode == 75
    assert node_state(tmp_path, nodes[0]) is State.PREEMPTED
    assert node_state(tmp_path, nodes[1]) is State.WAITING
    outcome = sweep(tmp_path, [node("a/seed1"), nodes[1]])
    assert set(outcome.values()) == {State.FINISHED}
    assert len(starts(tmp_path, "a/seed1")) == 2


def test_a_second_interrupt_kills(tmp_path):
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); open('{}', 'w'); time.sleep(60)"
    )
    nodes, ready = [node("a/seed1")], tmp_path / "ready"

    def run():
        argv = [sys.executable, "-c", deaf.format(ready)]
        launch.LocalSweep(str(tmp_path), nodes, command=lambda *_: argv, poll=0.01).run()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    until(ready.exists)
    os.kill(process.pid, signal.SIGINT)
    process.join(0.3)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 0
    assert not held(tmp_path / "a/seed1/.claim")


def test_a_killed_sweep_is_gone_on_with_and_nothing_runs_twice(tmp_path):
    a, b, c = ids("abc")
    nodes = [node(a), node(b, [a], options=("SECONDS", 1.5)), node(c, [b])]
    with sweeping(tmp_path, nodes) as first:
        until(lambda: starts(tmp_path, b))
        first.kill()
        first.join()
        [pid] = starts(tmp_path, b)
        os.kill(pid, 0)  # still runs, and is known to
        assert node_state(tmp_path, nodes[1]) is State.RUNNING
        assert set(sweep(tmp_path, nodes).values()) == {State.FINISHED}
        assert [len(starts(tmp_path, id)) for id in (a, b, c)] == [1, 1, 1]


def test_killed_together_with_its_runs_a_sweep_resumes_them(tmp_path):
    nodes = [node("a/seed1", options=SLOW)]
    with sweeping(tmp_path, nodes) as first:
        until(
            lambda: (
                node_state(tmp_path, nodes[0]) is State.RUNNING and (tmp_path / "a/seed1/run.json").exists()
            )
        )
        first.kill()
        os.kill(starts(tmp_path, "a/seed1")[0], signal.SIGKILL)
        until(lambda: node_state(tmp_path, nodes[0]) is State.INTERRUPTED)
    assert sweep(tmp_path, [node("a/seed1")]) == {"a/seed1": State.FINISHED}


def test_several_sweeps_at_once_run_each_once(tmp_path):
    nodes = [node(id, options=("SECONDS", 0.05)) for id in ids("abcdef")]
    nodes += [node("z/seed1", [n.id for n in nodes])]
    with contextlib.ExitStack() as stack:
        sweeps = [stack.enter_context(sweeping(tmp_path, nodes, parallel=2)) for _ in range(3)]
        for process in sweeps:
            process.join(60)
        assert [process.exitcode for process in sweeps] == [0, 0, 0]
    assert [len(starts(tmp_path, n.id)) for n in nodes] == [1] * len(nodes)


def looking_first(monkeypatch, then):
    """Let the first look at a run tell that it waits, and something happen right after it."""
    looks = []

    def look(out, node):
        looks.append(node)
        if len(looks) > 2:  # the first is the sweep's own at its beginning
            return node_state(out, node)
        if len(looks) == 2:
            then()
        return State.WAITING

    monkeypatch.setattr(launch, "node_state", look)


def test_a_run_that_ends_between_look_and_claim_is_not_run_again(tmp_path, monkeypatch):
    nodes = [node("a/seed1")]
    sweep(tmp_path, nodes)
    looking_first(monkeypatch, lambda: None)
    assert sweep(tmp_path, nodes) == {"a/seed1": State.FINISHED}
    assert len(starts(tmp_path, "a/seed1")) == 1


@pytest.mark.parametrize("name", [".claim", ".lock"])
def test_a_run_that_is_taken_between_look_and_claim_is_waited_for(tmp_path, monkeypatch, capsys, name):
    path, argv = tmp_path / "a/seed1" / name, [sys.executable, "-S", "-c", "import time; time.sleep(0.3)"]

    def take():
        claim = lock(str(path))
        subprocess.Popen(argv, pass_fds=[claim])
        os.close(claim)

    looking_first(monkeypatch, take)
    assert sweep(tmp_path, [node("a/seed1")]) == {"a/seed1": State.FINISHED}
    assert "again" not in capsys.readouterr().out  # a stand-in that finds the lock taken fails


def test_stop_preempts_one_run_until_a_later_sweep(tmp_path):
    a, b, c = ids("abc")
    nodes = [node(a, options=SLOW), node(b, [a]), node(c)]
    with sweeping(tmp_path, nodes, parallel=2) as process:
        until(lambda: all((tmp_path / a / name).exists() for name in ("run.json", "launch.json")))
        assert "asked to stop" in stop(str(tmp_path), a)
        process.join(60)
        assert process.exitcode == 75
    assert node_state(tmp_path, nodes[0]) is State.PREEMPTED
    assert node_state(tmp_path, nodes[2]) is State.FINISHED
    assert set(sweep(tmp_path, [node(a), *nodes[1:]]).values()) == {State.FINISHED}


def test_stop_reaches_a_run_that_the_waiting_sweep_did_not_start(tmp_path):
    nodes = [node("a/seed1", options=SLOW)]
    with sweeping(tmp_path, nodes) as first:
        until(lambda: all((tmp_path / "a/seed1" / name).exists() for name in ("run.json", "launch.json")))
        first.kill()
        first.join()
        with sweeping(tmp_path, nodes) as second:
            second.join(0.3)
            stop(str(tmp_path), "a/seed1")
            second.join(60)
            assert second.exitcode == 75
        assert len(starts(tmp_path, "a/seed1")) == 1


def test_stop_touches_no_other_process(tmp_path):
    with pytest.raises(ValueError, match="does not run"):
        stop(str(tmp_path), "a/seed1")
    sweep(tmp_path, [node("a/seed1")])
    with pytest.raises(ValueError, match="does not run"):
        stop(str(tmp_path), "a/seed1")
    # Its process id is another's by now, and somebody else holds the claim.
    path = tmp_path / "a/seed1/launch.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "pid": os.getpid()}))
    claim = lock(str(tmp_path / "a/seed1/.claim"))
    with pytest.raises(ValueError, match="does not run any more"):
        stop(str(tmp_path), "a/seed1")
    path.write_text(json.dumps({**json.loads(path.read_text()), "host": "elsewhere"}))
    with pytest.raises(ValueError, match="runs on elsewhere"):
        stop(str(tmp_path), "a/seed1")
    os.close(claim)


def test_a_lock_outlives_its_sweep_in_the_run(tmp_path):
    claim = lock(str(tmp_path / "a/.claim"))
    child = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[claim])
    os.close(claim)
    assert held(tmp_path / "a/.claim") and lock(str(tmp_path / "a/.claim")) is None
    child.communicate()
    assert not held(tmp_path / "a/.claim")


def test_weights_that_a_parent_makes_enter_the_identity_when_they_exist(tmp_path):
    weights = tmp_path / "model_final.pth"
    options = ("MODEL.WEIGHTS", str(weights), "SOLVER.SCHEDULE", "2x")
    before = current(node("a/seed1", options=options), 1).identity
    weights.write_bytes(b"weights")
    assert current(node("a/seed1", options=options), 1).identity != before
    assert current(node("a/seed1", identity="x"), 1).identity == "x"


def test_standins_do_not_run_two_in_one_folder(tmp_path):
    sweep(tmp_path, [node("a/seed1")])
    argv = standin.command(node("a/seed1"), 1, str(tmp_path))
    with open(tmp_path / "a/seed1/.lock") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert subprocess.run(argv, capture_output=True).returncode == 1
