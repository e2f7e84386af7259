"""A plan whose runs are tiny scripts that leave what a training leaves; for the tests of the sweep.

Run as a script it is such a run: ``standin.py FOLDER IDENTITY KEY VALUE ...``, where SECONDS is how long it
takes (a list: each start), CODES the exit codes of its first starts (negative: it kills itself), ERROR its
last_error, GAIN by how many iterations each start brings its checkpoint on.
"""

import json
import os
import signal
import sys
import time


def node(id, parents=(), kind="train", identity=None, options=(), **kwargs):
    """A node of a plan. Its identity is its own id unless another is given."""
    from rethink_d2 import paper
    from rethink_d2.sweep.plan import Node

    values = {
        "config_file": "",
        "branch_from": None,
        "start": 0,
        "iterations": 0 if kind == "evaluate" else 40,
        "gpu_hours": 1.0,
        "disk_gb": 0.001,
    }
    return Node(
        id=id,
        run=paper.find("base-r50-gn-scratch-2x"),
        seed=1,
        kind=kind,
        options=tuple(map(str, options)),
        parents=tuple(parents),
        identity=identity or id,
        **{**values, **kwargs},
    )


def command(node, num_gpus, out):
    """The command of a stand-in."""
    return [sys.executable, "-S", __file__, os.path.join(out, node.id), node.identity, *node.options]


def sweep(out, nodes, codes=None, **kwargs):
    """Run a LocalSweep; in `codes`, a list, the exit code of its summary. Returns the outcome."""
    from rethink_d2.sweep.launch import LocalSweep, summary

    outcome = LocalSweep(str(out), nodes, command=command, poll=0.01, **kwargs).run()
    text, code = summary(str(out), nodes, outcome)
    print(text)
    if codes is not None:
        codes.append(code)
    return outcome


def starts(out, id):
    """The ids of the processes that a run was started as, first to last."""
    path = os.path.join(out, id, "starts")
    return [int(line) for line in open(path)] if os.path.exists(path) else []


def until(happened, timeout=30):
    """Wait for ``happened()`` to be true."""
    end = time.monotonic() + timeout
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def main(folder, identity, *options):
    """Behave as a training does."""
    import fcntl

    options = dict(zip(options[::2], options[1::2], strict=True))
    record = {"identity": identity, "state": "running", "last_error": None}

    def write(state, error=None):
        record.update(state=state, last_error=error)
        with open(os.path.join(folder, "run.json.new"), "w") as f:
            json.dump(record, f)
        os.replace(f.name, os.path.join(folder, "run.json"))

    def stop(number, frame):
        write("preempted")
        sys.exit(75)

    signal.signal(signal.SIGTERM, stop)
    lock = open(os.path.join(folder, ".lock"), "w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where two run at once
    with open(os.path.join(folder, "starts"), "a+") as f:
        f.write(f"{os.getpid()}\n")
        f.seek(0)
        start = len(f.readlines())
    codes = json.loads(options.get("CODES", "[]"))
    code = codes[start - 1] if start <= len(codes) else 0
    if code != 2:
        write("running")
    if "GAIN" in options:
        open(os.path.join(folder, f"model_{start * int(options['GAIN']):07d}.pth"), "w").close()
    seconds = json.loads(options.get("SECONDS", "0"))
    time.sleep(seconds[start - 1] if isinstance(seconds, list) else seconds)
    if code < 0:
        os.kill(os.getpid(), -code)
    if code:
        print("error: this is why")
        if code != 2:
            write("failed", options.get("ERROR", "RuntimeError: no luck\nand more"))
        sys.exit(code)
    write("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
