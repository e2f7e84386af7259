import contextlib
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
from filelock import FileLock
from made_runs import make_run

from rethink_d2.engine.record import append_result
from rethink_d2.report import write_report
from rethink_d2.report.__main__ import cli
from rethink_d2.report.serve import _keep_up, _snapshot, make_server


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """An output folder with a secret beside it, and links that lead there."""
    root = tmp_path_factory.mktemp("serve")
    (root / "secret.txt").write_text("secret")
    (root / "output2").mkdir()
    (root / "output2/secret.txt").write_text("secret")
    folder = root / "output"
    path = make_run(folder, "mine", {10: 1.0})
    (path / "page.html").write_text("<script>alert(1)</script>")
    os.symlink(root / "secret.txt", folder / "link.txt")
    os.symlink(root, folder / "links")
    os.symlink(path / "results.json", folder / "inside.json")
    write_report(str(folder))
    (folder / "report/gallery").mkdir()
    (folder / "report/gallery/a.html").write_text("<h1>gallery</h1>")
    return folder


@pytest.fixture(scope="module")
def get(out):
    """Ask a running server for a path, which is sent as it is."""
    server = make_server(str(out))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()

    def ask(path, method="GET"):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=20)
        connection.putrequest(method, path)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer, content

    yield ask
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_page_loads_itself_again_only_when_served(out, get):
    answer, content = get("/report/index.html")
    assert answer.status == 200 and content.count(b"location.reload()") == 1
    assert b"location.reload()" not in (out / "report/index.html").read_bytes()
    head, nothing = get("/report/index.html", "HEAD")
    assert nothing == b"" and head.getheader("Last-Modified") == answer.getheader("Last-Modified")
    assert int(head.getheader("Content-Length")) == len(content)
    for path in ("/", "/report", "/report/"):
        first, _ = get(path)
        assert first.status == 302 and first.getheader("Location") == "/report/index.html"


@pytest.mark.parametrize(
    "path, kind",
    [
        ("/mine/seed1/run.json", "text/plain; charset=utf-8"),
        ("/mine/seed1/config.yaml?x=1", "text/plain; charset=utf-8"),
        ("/mine/seed1/page.html", "text/plain; charset=utf-8"),
        ("/report/gallery/a.html", "text/html; charset=utf-8"),
        ("/report/figure_2.png", "image/png"),
        ("/inside.json", "text/plain; charset=utf-8"),
    ],
)
def test_files_and_their_types(get, path, kind):
    answer, content = get(path)
    assert answer.status == 200 and answer.getheader("Content-Type") == kind and content
    assert answer.getheader("X-Content-Type-Options") == "nosniff"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret.txt",
        "/report/../../secret.txt",
        "/%2e%2e/secret.txt",
        "/..%2fsecret.txt",
        "/report/%2e%2e%2f%2e%2e%2fsecret.txt",
        "/../output2/secret.txt",
        "//etc/passwd",
        "/%2fetc/passwd",
        "/links/secret.txt",
        "/link.txt",
        "/mine",
        "/mine/",
        "/report/gallery/",
        "/nothing",
        "/%00",
        "/" + "a" * 5000,
    ],
)
def test_nothing_outside_and_no_listing(get, path):
    answer, content = get(path)
    assert answer.status == 404 and b"secret" not in content.replace(b"secret.txt", b"")


def test_an_address_that_is_taken(out, capsys):
    with make_server(str(out)) as server:
        port = server.server_address[1]
        assert server.server_address[0] == "127.0.0.1"
        assert cli([str(out), "--serve", "--port", str(port)]) == 2
    assert f"--host 127.0.0.1 --port {port}: " in capsys.readouterr().err


@contextlib.contextmanager
def watched(out):
    """A report that follows its runs; what it calls may fail."""
    write_report(str(out))
    stop = threading.Event()
    thread = threading.Thread(target=_keep_up, args=(str(out), _snapshot(str(out)), 0.02, stop))
    thread.start()
    try:
        yield out / "report/index.html"
        assert thread.is_alive()
    finally:
        stop.set()
        thread.join()


def test_the_report_follows_the_runs(tmp_path):
    path = make_run(tmp_path, "mine", {10: 1.0}, state="running", max_iter=100)
    with watched(tmp_path) as page:
        before = page.stat().st_mtime_ns
        time.sleep(0.2)
        assert page.stat().st_mtime_ns == before  # nothing has changed
        append_result(str(path), 20, "coco_2017_val", {"bbox/AP": 98.7})
        until(lambda: "98.7" in page.read_text())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RecursionError("a\nb")])
def test_a_failure_is_said_once_and_tried_again(tmp_path, monkeypatch, capsys, error):
    path = make_run(tmp_path, "mine", {10: 1.0}, state="running", max_iter=100)
    calls = []

    def flaky(out):
        calls.append(out)
        if len(calls) < 4:
            raise error
        return write_report(out)

    with watched(tmp_path) as page:
        monkeypatch.setattr("rethink_d2.report.serve.write_report", flaky)
        append_result(str(path), 20, "coco_2017_val", {"bbox/AP": 98.7})
        until(lambda: "98.7" in page.read_text())
    words = " ".join(str(error).split())
    assert capsys.readouterr().err == f"error: {type(error).__name__}: {words}\n"


def test_a_killed_run_does_not_stay_running(tmp_path):
    path = make_run(tmp_path, "mine", {10: 1.0}, state="running", max_iter=100)
    with FileLock(path / ".lock") as lock, watched(tmp_path) as page:
        assert 'class="state running"' in page.read_text()
        lock.release(force=True)  # as a kill does, which writes nothing
        until(lambda: 'class="state interrupted"' in page.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("option", ["--watch", "--serve"])
def test_the_command_ends_with_ctrl_c(tmp_path, option):
    make_run(tmp_path, "mine", {10: 12.3})
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "rethink_d2.report",
        str(tmp_path),
        option,
        "--port",
        "0",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        assert "report/index.html" in line, process.stderr.read()
        if option == "--serve":
            with urllib.request.urlopen(line.split()[0], timeout=20) as answer:
                assert b"12.3" in answer.read()
    finally:
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""


def until(happened):
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
