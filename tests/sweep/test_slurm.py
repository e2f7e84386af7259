"""Sweeps on a real Slurm of one machine, started and stopped here."""

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import standin
import torch
from standin import node, starts, until

from rethink_d2 import model_zoo, recipe
from rethink_d2.files import read_json
from rethink_d2.sweep.plan import resolved
from rethink_d2.sweep.preflight import preflight
from rethink_d2.sweep.process import stop
from rethink_d2.sweep.slurm import SlurmSweep
from rethink_d2.sweep.state import State, progress, queue, recorded_state

pytestmark = pytest.mark.slow

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ctld}
SlurmdPort={slurmd}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
KillWait=20
ReturnToService=2
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
CPU = {"gpus_per_node": "0", "partition": "main", "time": "1"}
MINI = model_zoo.get_config_file("mini/scratch_mask_rcnn_R_18_FPN_gn.yaml")
OPTIONS = [
    *("DATASETS.TRAIN", "('glyphs_tiny_train',)", "DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "0"),
    *("SOLVER.IMS_PER_BATCH", "2", "SOLVER.WARMUP_ITERS", "2", "INPUT.MIN_SIZE_TRAIN", "(64,)"),
    *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50"),
    *("SOLVER.CHECKPOINT_PERIOD", "4", "SOLVER.BRANCH_POINTS", "(20,)", "MODEL.DEVICE", "cpu"),
]


# Seconds that nothing takes, also on a busy machine.
LONG = 400


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _answers():
    found = subprocess.run(["sinfo", "-h", "-t", "idle"], capture_output=True, text=True)
    return "main" in found.stdout


@pytest.fixture(scope="module")
def slurm(tmp_path_factory, glyph_cache):
    """A Slurm of one machine with two cores; skips where it cannot be had."""
    programs = ("munged", "slurmctld", "slurmd", "srun", "sbatch")
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    lacking = [name for name in programs if shutil.which(name, path=path) is None]
    if lacking:
        pytest.skip(f"needs Slurm: no {', '.join(lacking)} (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid():
        pytest.skip("starting Slurm's daemons needs root")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    conf = folder / "slurm.conf"
    ports = {"ctld": _free_port(), "slurmd": _free_port()}
    conf.write_text(CONF.format(host=socket.gethostname().split(".")[0], folder=folder, **ports))
    munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
    daemons = (
        ["munged", "--foreground", "--force", f"--key-file={key}", *munge],
        ["slurmctld", "-D", "-c"],
        ["slurmd", "-D", "-c"],
    )
    # One thread: jobs side by side, and a bit for bit comparison.
    settings = {"SLURM_CONF": str(conf), "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        stack.callback(_kill, conf)
        for name, value in settings.items():
            patch.setenv(name, value)
        for argv in daemons:
            log = stack.enter_context(open(folder / f"{argv[0]}.out", "w"))
            daemon = subprocess.Popen(argv, stdout=log, stderr=log, start_new_session=True)
            stack.callback(daemon.wait)
            stack.callback(daemon.terminate)
            until(lambda: argv[0] != "munged" or (folder / "munge.socket").exists())  # noqa: B023
        until(_answers, 60)
        yield folder


def _kill(conf):
    """Nothing of this Slurm is left running, whatever went wrong."""
    tag = f"SLURM_CONF={conf}".encode()
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):  # others', or just ended
            if entry.name.isdigit() and tag in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(int(entry.name), signal.SIGKILL)


def run_slurm(out, nodes, **kwargs):
    return SlurmSweep(str(out), nodes, **{"options": CPU, "poll": 0.5, **kwargs}).run()


@contextlib.contextmanager
def in_background(out, nodes, **kwargs):
    """A sweep in a process of its own, which exits with 0 when it comes to its end."""
    process = multiprocessing.get_context("fork").Process(target=run_slurm, args=(out, nodes), kwargs=kwargs)
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def mini(out, id, schedule, trunk=None, processes=1):
    """A node of a real training."""
    options = [*OPTIONS, "SOLVER.SCHEDULE", str(schedule), "OUTPUT_DIR", os.path.join(out, id)]
    made = node(
        id,
        [trunk] if trunk else [],
        kind="branch" if trunk else "train",
        options=options,
        config_file=MINI,
        branch_from=trunk,
        start=20 if trunk else 0,
        iterations=schedule - (20 if trunk else 0),
    )
    return dataclasses.replace(made, identity=recipe.identity(resolved(made, processes)))


def evaluating(out, id, parent, iterations):
    """A node of a real evaluation of what another one will have trained."""
    options = [*OPTIONS, "SOLVER.SCHEDULE", str(iterations), "DATASETS.TEST", "('glyphs_tiny_val',)"]
    options += ["MODEL.WEIGHTS", os.path.join(out, parent, "model_final.pth")]
    options += ["OUTPUT_DIR", os.path.join(out, id)]
    return node(id, [parent], kind="evaluate", options=options, config_file=MINI)


def weights(folder):
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    found = hashlib.sha256()
    for part in ("model", "optimizer"):
        for name, value in sorted(flat(saved[part]).items()):
            found.update(f"{name} {value.numpy().tobytes() if torch.is_tensor(value) else value}".encode())
    return found.hexdigest()


def flat(tree, prefix=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    leaves = {}
    for key, value in items:
        name = f"{prefix}.{key}"
        leaves.update(flat(value, name) if isinstance(value, (dict, list)) else {name: value})
    return leaves


def launched(out, id):
    return read_json(os.path.join(out, id, "launch.json"), {})


def test_preempted_jobs_and_a_killed_sweep_end_as_undisturbed_ones(slurm, tmp_path):
    a, b = "trunk/seed1", "branch/seed1"

    def graph(out):
        return [mini(out, a, 66), mini(out, b, 60, trunk=a)]

    def state(id):
        return read_json(disturbed / id / "run.json", {}).get("state")

    disturbed, quiet = tmp_path / "disturbed", tmp_path / "quiet"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(in_background(disturbed, graph(disturbed)))
        reference = stack.enter_context(in_background(quiet, graph(quiet)))
        until(lambda: list((disturbed / a).glob("model_*.pth.sha256")), LONG)
        # Preempted by Slurm, while the sweep is killed.
        jobs = {id: launched(disturbed, id)["job_id"] for id in (a, b)}
        first.kill()
        subprocess.run(["scontrol", "requeue", jobs[a]], check=True)
        second = stack.enter_context(in_background(disturbed, graph(disturbed)))
        until(lambda: state(a) == "preempted", LONG)
        until(lambda: queue().get(jobs[a]) == "RUNNING", LONG)
        assert progress(str(disturbed), graph(disturbed)[0], queue()).state is State.RUNNING
        until(lambda: list((disturbed / b).glob("model_*.pth.sha256")), LONG)
        # As before a time limit: Slurm sends submitit's signal.
        subprocess.run(["scancel", "--signal=USR2", jobs[b]], check=True)
        until(lambda: state(b) == "preempted", LONG)
        for process in (second, reference):
            process.join(LONG)
            assert process.exitcode == 0
    assert {id: launched(disturbed, id)["job_id"] for id in (a, b)} == jobs  # nothing was submitted twice
    assert run_slurm(disturbed, graph(disturbed)) == {a: State.FINISHED, b: State.FINISHED}
    for id in (a, b):
        assert weights(disturbed / id) == weights(quiet / id)
        assert (disturbed / id / "launch.log").read_text().count("Starting training from iteration") == 2


def test_stopped_cancelled_crashed_and_refused_runs(slurm, tmp_path, capfd):
    a, b, c, d, e, f = (f"{name}/seed1" for name in "abcdef")
    nodes = [
        *(node(a, options=("SECONDS", 900)), node(f, options=("SECONDS", 900)), node(b, [a])),
        *(node(c, options=("CODES", [-9])), node(d, options=("CODES", [2] * 9)), node(e, [d])),
    ]
    with contextlib.ExitStack() as stack:
        both = [in_background(tmp_path, nodes, command=standin.command) for _ in range(2)]
        both = [stack.enter_context(sweep) for sweep in both]
        until(lambda: all((tmp_path / id / "run.json").exists() for id in (a, f)), LONG)
        assert "Slurm job" in stop(str(tmp_path), a)
        subprocess.run(["scancel", launched(tmp_path, f)["job_id"]], check=True)
        for sweep in both:
            sweep.join(LONG)
            assert sweep.exitcode == 0
    assert capfd.readouterr().out.count("submitted") == len(nodes)
    assert [len(starts(tmp_path, id)) for id in (a, b, c, d, e, f)] == [1, 0, 2, 1, 0, 1]
    states = {n.id: recorded_state(str(tmp_path), n) for n in nodes}
    assert states[a] == states[f] == State.PREEMPTED
    assert (states[c], states[d]) == (State.FINISHED, State.FAILED)
    assert states[b] == states[e] == State.WAITING
    log = "".join(path.read_text() for path in (tmp_path / ".slurm").glob("*.err"))
    assert f"{b} needs {a}, which is not done (run.json: preempted)" in log
    assert f"{e} needs {d}, which is not done (run.json: not started)" in log
    assert f"{d} ended with 2: error: this is why" in log
    with pytest.raises(ValueError, match="has ended"):
        stop(str(tmp_path), a)

    outcome = run_slurm(tmp_path, [node(a), nodes[2]], command=standin.command)
    assert outcome == {a: State.FINISHED, b: State.FINISHED}


def test_processes_of_one_job_train_one_model_and_evaluate_it(slurm, tmp_path):
    made, evaluation = (
        mini(tmp_path, "a/seed1", 4, processes=2),
        evaluating(tmp_path, "b/seed1", "a/seed1", 4),
    )
    outcome = run_slurm(tmp_path, [made, evaluation], num_gpus=2)
    assert outcome == {"a/seed1": State.FINISHED, "b/seed1": State.FINISHED}
    assert read_json(tmp_path / "a/seed1/run.json")["world_size"] == 2
    [row] = read_json(tmp_path / "b/seed1/results.json")
    assert (row["iteration"], row["dataset"]) == (4, "glyphs_tiny_val")
    assert (tmp_path / "b/seed1/launch.log").read_text().count("Start inference") == 1


def test_a_run_longer_than_its_time_limit_goes_on_in_the_next_job(slurm, tmp_path):
    made = node("a/seed1", options=("SECONDS", [900, 0]))
    limit = {"time": "0.0167", "signal": "USR2@30"}  # a minute, Slurm's shortest
    assert run_slurm(tmp_path, [made], command=standin.command, options={**CPU, **limit}) == {
        "a/seed1": State.FINISHED
    }
    assert len(starts(tmp_path, "a/seed1")) == 2
    [log] = [path.read_text() for path in (tmp_path / ".slurm").glob("*_0_log.err")]
    assert "Caught signal SIGUSR2" in log and "DUE TO TIME LIMIT" not in log


def test_says_what_the_cluster_lacks(slurm, tmp_path):
    nodes = [node("a/seed1", config_file=MINI, options=OPTIONS)]
    assert preflight(str(tmp_path), nodes, slurm=CPU) == []
    [problem] = preflight(str(tmp_path), nodes, slurm={"partition": "gpu"})
    assert "there is no gpu; this cluster has main" in problem
    with pytest.raises(ValueError, match="a/seed1: .*invalid partition"):
        run_slurm(tmp_path, nodes, options={**CPU, "partition": "gpu"})
