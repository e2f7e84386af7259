"""scripts/setup.sh against a stand-in Python, and the import without Detectron2. Nothing is downloaded."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Answers what setup.sh asks of Python and pip, and writes down every call. "pip install" only leaves a
# mark, which the look-up of modules then goes by.
PYTHON = """#!/bin/bash
echo "$*" >> "$CALLS"
case "$*" in
  *find_spec*) [ -e "$CALLS.installed" ] ;;
  *version_info*) echo "${FAKE_VERSION:-3.11}" ;;
  *ensurepip*) [ -z "${NO_PIP:-}" ] ;;
  *purelib*) echo "$CALLS.site" ;;
  *"-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *"-m pip --version") [ -z "${NO_PIP:-}" ] ;;
  *"-m pip install"*)
    if [ -n "${PIP_ERROR:-}" ]; then echo "$PIP_ERROR" >&2; exit 1; fi
    if [[ "$*" == *--require-hashes* ]]; then cat "$6" >> "$CALLS"; fi
    if [[ "$*" == *" -e "* ]]; then touch "$CALLS.installed"; fi ;;
  *"-m pip "*) ;;
  *) echo "unexpected: $*" >&2; exit 3 ;;
esac
"""
GIT = """#!/bin/bash
echo "git $*" >> "$CALLS"
"""
OFFLINE = "ERROR: Could not find a version that satisfies the requirement torch==2.14.1 (from versions: none)"


class Checkout:
    def __init__(self, root: Path):
        self.root, self.calls_file = root / "checkout", root / "calls"
        (self.root / "scripts").mkdir(parents=True)
        (root / "bin").mkdir()
        for name in ("scripts/setup.sh", "scripts/requirements.txt", "setup.py"):
            shutil.copy(ROOT / name, self.root / name)
        for name, text in {"python3.11": PYTHON, "git": GIT}.items():
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        # No HOME: setup.sh must not need it.
        self.env = {
            "PATH": f"{root / 'bin'}:/usr/bin:/bin",
            "CALLS": str(self.calls_file),
            "RETHINK_D2_MIN_FREE_GB": "0",
        }

    def setup(self, *args, **env):
        self.calls_file.write_text("")
        command = [str(self.root / "scripts/setup.sh"), *args]
        return subprocess.run(command, cwd="/", env=self.env | env, capture_output=True, text=True)

    @property
    def calls(self):
        return self.calls_file.read_text().splitlines()

    @property
    def stamp(self):
        return self.root / ".venv/setup.stamp"


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def pip_calls(calls):
    return [c for c in calls if c.startswith("-m pip") and not c.endswith("--version")]


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"FAKE_VERSION": "3.8"}, "python3.11 is Python 3.8, 3.11 or newer is needed"),
        ({"FAKE_VERSION": "2.7"}, "Python 2.7"),
        ({"PYTHON": "no-such-python"}, "no-such-python not found"),
        ({"NO_PIP": "1"}, "python3.11 has no venv or pip"),
        ({"RETHINK_D2_MIN_FREE_GB": "999999"}, "999999 are needed"),
    ],
)
def test_refuses_before_making_anything(checkout, env, words):
    done = checkout.setup(**env)
    assert done.returncode == 1
    assert words in done.stderr and done.stderr.count("\n") == 1
    assert not (checkout.root / ".venv").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OFFLINE, "no network"),
        (
            "Failed to establish a new connection: [Errno -2] Name or service not known\n" + OFFLINE,
            "no network;",
        ),
        ("ERROR: Could not install packages: [Errno 28] No space left on device", "disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "sha256 differs"),
        ("Ignored the following versions that require a different python version\n" + OFFLINE, "python3.11"),
        ("Segmentation fault", "unknown cause"),
    ],
)
def test_failure_of_pip_is_one_line_and_resumed(checkout, error, words):
    done = checkout.setup(PIP_ERROR=error)
    log = checkout.root / ".venv/setup.log"
    assert done.returncode == 1
    assert words in done.stderr and str(log) in done.stderr and done.stderr.count("\n") == 1
    assert error in log.read_text() and error not in done.stdout
    assert not checkout.stamp.exists()

    # The half-made .venv is used on, not made again.
    assert checkout.setup().returncode == 0
    assert checkout.stamp.exists() and not any(c.startswith("-m venv") for c in checkout.calls)


def test_installs_once_and_again_after_a_change(checkout):
    done = checkout.setup()
    assert done.returncode == 0 and done.stderr == ""
    pips = pip_calls(checkout.calls)
    assert len(pips) == 3
    assert str(checkout.root / "scripts/requirements.txt") in pips[0]
    assert "--target" in pips[1] and "--no-deps" in pips[1]
    assert any(c.startswith("sal-detectron2==0.7.2 --hash=sha256:491af0c7") for c in checkout.calls)
    assert pips[2].endswith(f"-e {checkout.root}")
    assert not (checkout.root / ".venv/setup.tmp").exists()

    before = checkout.stamp.stat().st_mtime_ns
    assert checkout.setup().returncode == 0
    assert pip_calls(checkout.calls) == [] and checkout.stamp.stat().st_mtime_ns == before

    with (checkout.root / "scripts/requirements.txt").open("a") as f:
        f.write("another==1\n")
    # After a failed change nothing is up to date, even if the change is taken back.
    assert checkout.setup(PIP_ERROR=OFFLINE).returncode == 1 and not checkout.stamp.exists()
    assert checkout.setup().returncode == 0
    pips = pip_calls(checkout.calls)
    assert len(pips) == 2 and not any("--target" in c for c in pips)  # Detectron2 is kept


def test_official_builds_the_pinned_commit(checkout):
    assert checkout.setup().returncode == 0  # the re-publication, which --official replaces
    assert checkout.setup("--official").returncode == 0
    calls = checkout.calls
    clone, switch = (c.split() for c in calls if c.startswith("git "))
    source = clone[-1]
    assert clone[1] == "clone" and "https://github.com/facebookresearch/detectron2.git" in clone
    assert switch[1:4] == ["-C", source, "checkout"] and switch[-1].startswith("a59f0563")
    build = next(c for c in calls if c.startswith("-m pip wheel"))
    assert source in build and "--no-build-isolation" in build and "--no-deps" in build
    assert "-m pip uninstall -y sal-detectron2" in calls
    assert not any("--require-hashes" in c for c in calls)

    # Asked for or not, it stays.
    for args in ([], ["--official"]):
        assert checkout.setup(*args).returncode == 0
        assert pip_calls(checkout.calls) == []


def test_unknown_option(checkout):
    done = checkout.setup("--offical")
    assert done.returncode == 1 and "usage" in done.stderr and checkout.calls == []


def test_second_run_of_the_real_setup_changes_nothing():
    stamp = ROOT / ".venv/setup.stamp"
    if not stamp.exists():
        pytest.skip("this checkout was not set up by scripts/setup.sh")
    env = {k: v for k, v in os.environ.items() if k != "HOME"}
    times = []
    for _ in range(2):  # the first one may have a reason to install
        done = subprocess.run([ROOT / "scripts/setup.sh"], cwd="/", env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        times.append(stamp.stat().st_mtime_ns)
    assert "up to date" in done.stdout and times[0] == times[1]


def test_import_without_detectron2_says_how_to_get_it():
    code = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "detectron2":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
try:
    import rethink_d2
except ImportError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Detectron2" in done.stdout and "scripts/setup.sh" in done.stdout
