"""What an installation holds that is no checkout."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_file_is_installed(tmp_path):
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, timeout=120)
    inside = tmp_path / "rethink_d2"
    wanted = [inside / path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")]
    wanted += [tmp_path / path.relative_to(ROOT) for path in (ROOT / "rethink_d2").rglob("*")]
    missing = [
        path for path in wanted if path.suffix != ".pyc" and path.name != "__pycache__" and not path.exists()
    ]
    assert len(wanted) > 200 and not missing
