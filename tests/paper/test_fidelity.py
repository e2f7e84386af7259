from pathlib import Path

import pytest

from rethink_d2.paper import settings
from rethink_d2.paper.__main__ import cli
from rethink_d2.paper.check import RULES
from rethink_d2.paper.fidelity import document

FILE = Path(__file__).parents[2] / "docs/fidelity.md"


def test_the_file_is_what_the_command_prints(capsys):
    assert cli(["fidelity"]) == 0
    printed = capsys.readouterr().out
    assert FILE.read_text() == printed, "run: python -m rethink_d2.paper fidelity > docs/fidelity.md"


def test_every_setting_and_every_rule_has_a_row():
    rows = [line for line in document().splitlines() if line.startswith("|") and "---" not in line]
    groups = {setting.group for setting in settings.load()}
    # With the heads of the tables: of each group, and of the rules.
    assert len(rows) == len(settings.load()) + len(RULES) + len(groups) + 1
    for rule in RULES:
        assert any(rule.what in row for row in rows)


@pytest.mark.parametrize(
    "row",
    [
        "| `* !imagenet-*` | initial rate 0.02 | `SOLVER.BASE_LR` = `0.02` | `0.001` | paper, section 4 |  |",
        # A key of this project has no default of Detectron2.
        "| `* !imagenet-*` | box voting from IoU 0.9 | `TEST.AUG.BOX_VOTE_THRESH` = `0.9` | own key |"
        " Detectron configs/test_time_aug |  |",
    ],
)
def test_rows(row):
    assert row in document().splitlines()


def test_tables_are_whole():
    for line in document().splitlines():
        if line.startswith("|"):
            assert line.count(" | ") in (2, 5)
