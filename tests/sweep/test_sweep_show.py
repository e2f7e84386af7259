"""A plan as table, tree and Graphviz text."""

import json
import re

import pytest

from rethink_d2.sweep.plan import plan
from rethink_d2.sweep.show import dot, summary, table, tree


@pytest.fixture(scope="module")
def nodes():
    """With pre-training and a trunk that came along."""
    return plan(
        "OUT",
        only=["cascade-r50-scratch-*", "base-r50-gn-pretrained-*"],
        schedules=["2x", "3x", "9x"],
        mini=True,
    )


def test_the_table_has_a_line_for_every_node(nodes):
    lines = table(nodes).splitlines()
    assert len(lines) == 2 + len(nodes) + 1
    rows = {line.split()[0]: re.split(r"  +", line.strip()) for line in lines[2:-1]}
    assert rows["base-r50-gn-pretrained-2x/seed1"] == [
        "base-r50-gn-pretrained-2x/seed1",
        "branch",
        "72",
        "108",
        "36",
        *rows["base-r50-gn-pretrained-2x/seed1"][5:7],
        "base-r50-gn-pretrained-3x/seed1, imagenet-r50-gn-pretrained-100ep/seed1",
    ]
    marked = {line.split()[0] for line in lines[2:-1] if " * " in line}
    assert marked == {"aug-r50-scratch-9x/seed1", "imagenet-r50-gn-pretrained-100ep/seed1"}
    assert lines[-1].startswith("* came along")


def test_nothing_is_marked_where_nothing_came_along():
    assert "*" not in table(plan("OUT", only=["voc-*"]))


def test_the_summary_says_what_sharing_saves():
    text = summary(plan("OUT", only=["base-r50-gn-scratch-*", "imagenet-vgg16-*"]))
    assert re.search(r"detection +5 +780,000 .* instead of 1,800,000 \(0\.433\)", text)
    assert re.search(r"pre-training +1 +500,456 .*\d *$", text, re.MULTILINE)


def test_the_tree_has_every_node_once_below_what_it_continues(nodes):
    assert tree(nodes).splitlines() == [
        "imagenet-r50-gn-pretrained-100ep/seed1 *  pretrain 0 -> 600",
        "└── base-r50-gn-pretrained-3x/seed1  train 0 -> 162",
        "    └── base-r50-gn-pretrained-2x/seed1  branch 72 -> 108",
        "aug-r50-scratch-9x/seed1 *  train 0 -> 486",
        "└── cascade-r50-scratch-9x/seed1  cascade 324 -> 486",
    ]


def test_the_tree_of_a_whole_curve():
    lines = tree(plan("OUT", only=["base-r50-gn-scratch-*"])).splitlines()
    assert [line[:3] for line in lines] == ["bas", "├──", "├──", "├──", "└──"]


def test_graphviz_gets_every_node_and_every_dependency(nodes):
    text = dot(nodes)
    assert text.startswith("digraph sweep {") and text.endswith("}")
    name = r'("(?:[^"\\]|\\.)*")'
    edges = {(json.loads(a), json.loads(b)) for a, b in re.findall(f"{name} -> {name}", text)}
    assert edges == {(parent, node.id) for node in nodes for parent in node.parents}
    drawn = re.findall(rf"^  {name} \[label={name}", text, re.MULTILINE)
    assert [json.loads(id) for id, _ in drawn] == [node.id for node in nodes]
    assert '"aug-r50-scratch-9x/seed1" -> "cascade-r50-scratch-9x/seed1" [label="324"]' in text
