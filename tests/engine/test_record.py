import json

import torch.distributed as dist
from detectron2.utils import comm
from gloo import on_processes

from rethink_d2.engine.record import RunRecord, append_result


def test_a_repeated_evaluation_replaces_the_first_and_nan_becomes_null(tmp_path):
    append_result(str(tmp_path), 10, "a", {"bbox/AP": float("nan")})
    append_result(str(tmp_path), 10, "b", {"bbox/AP": 2.0})
    append_result(str(tmp_path), 20, "a", {"bbox/AP": 3.0})
    append_result(str(tmp_path), 10, "b", {"bbox/AP": 4.0})
    rows = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda name: 1 / 0)
    found = {(r["iteration"], r["dataset"]): r["bbox/AP"] for r in rows}
    assert found == {(10, "a"): None, (20, "a"): 3.0, (10, "b"): 4.0}


def test_a_second_start_keeps_when_the_run_began_and_adds_its_time(tmp_path):
    made = {"run_id": "r", "identity": "i", "seed": 1}
    first = RunRecord(str(tmp_path), **made)
    first.value["started"] = "2000-01-01T00:00:00Z"
    first._seconds_before = 100.0
    first.fail(ValueError("x"))
    assert json.loads((tmp_path / "run.json").read_text())["last_error"] == "ValueError: x"
    again = RunRecord(str(tmp_path), **made)
    again.write("done")
    value = json.loads((tmp_path / "run.json").read_text())
    assert value["started"].startswith("2000") and value["seconds"] >= 100
    assert value["state"] == "done" and value["last_error"] is None


def test_other_library_versions_are_said(tmp_path, caplog):
    made = {"run_id": "r", "identity": "i", "seed": 1}
    record = RunRecord(str(tmp_path), **made)
    RunRecord(str(tmp_path), **made)
    assert not caplog.text
    torch_now = record.value["versions"]["torch"]
    record.value["versions"]["torch"] = "1.0"
    record.write("preempted")
    RunRecord(str(tmp_path), **made)
    assert f"torch 1.0, now {torch_now}" in caplog.text


def failing_one_after_the_other(folder, first):
    record = RunRecord(folder, run_id="r", identity="i", seed=1)
    dist.barrier()
    if comm.get_rank() == first:
        record.fail(ValueError(f"an image that process {first} cannot read"))
    dist.barrier()
    if comm.get_rank() != first:
        record.fail(RuntimeError("Connection closed by peer"))


def test_the_error_of_the_process_that_failed_first_is_kept(tmp_path):
    for first in range(2):
        folder = tmp_path / str(first)
        on_processes(folder / "processes", 2, failing_one_after_the_other, str(folder), first)
        value = json.loads((folder / "run.json").read_text())
        assert value["state"] == "failed"
        assert value["last_error"] == f"ValueError: an image that process {first} cannot read"
