"""A plan as text: a table, what it saves, and its graph."""

import json
from collections.abc import Iterable, Sequence

from tabulate import tabulate

from .plan import Node, totals

__all__ = ["dot", "summary", "table", "tree"]

# Of the nodes that came along without being asked for.
_MARK = " *"
_COLOURS = {"pretrain": "lightblue", "train": "palegreen", "cascade": "orange", "evaluate": "lightgrey"}


def table(nodes: Sequence[Node]) -> str:
    """One line per node: what it trains from where to where, what that costs, and what comes before it."""
    headers = ["run", "kind", "from", "to", "iterations", "hours", "GB", "after"]
    rows = [
        [
            _name(node),
            node.kind,
            *(f"{number:,}" for number in _span(node)),
            f"{node.gpu_hours:,.1f}",
            f"{node.disk_gb:.1f}",
            ", ".join(node.parents),
        ]
        for node in nodes
    ]
    align = ("left", "left", *["right"] * 5, "left")
    lines = [tabulate(rows, headers, colalign=align, disable_numparse=True)]
    if any(not node.selected for node in nodes):
        lines.append(f"{_MARK.strip()} came along because others need it")
    return "\n".join(lines)


def summary(nodes: Iterable[Node]) -> str:
    """A line for detection, pre-training, evaluation and search each, with what sharing saves."""
    rows = []
    for name, total in totals(nodes).items():
        saved = ""
        if total.naive > total.iterations:
            saved = f"instead of {total.naive:,} ({total.iterations / total.naive:.3f}) if each ran alone"
        counts = f"{total.runs:,}", f"{total.iterations:,}", f"{total.gpu_hours:,.1f}", f"{total.disk_gb:.1f}"
        rows.append([name, *counts, saved])
    headers = ["", "runs", "iterations", "hours", "GB", ""]
    table = tabulate(rows, headers, colalign=("left", *["right"] * 4, "left"), disable_numparse=True)
    return f"{table}\nhours of a GPU (--mini: of a CPU core), by rethink_d2/sweep/costs.csv or as measured"


def tree(nodes: Sequence[Node]) -> str:
    """The graph as indented text, every node once, below the first of its parents."""
    known = {node.id: node for node in nodes}
    children = {}
    for node in nodes:
        children.setdefault(node.parents[0] if node.parents else None, []).append(node)
    lines = []

    def add(node, lead, branch, indent):
        also = [parent for parent in node.parents[1:] if parent not in _ancestors(node.parents[0], known)]
        remark = f", also after {', '.join(also)}" if also else ""
        lines.append(f"{lead}{branch}{_name(node)}  {_what(node)}{remark}")
        below = children.get(node.id, [])
        for child in below:
            last = child is below[-1]
            add(child, lead + indent, "└── " if last else "├── ", "    " if last else "│   ")

    for root in children.get(None, []):
        add(root, "", "", "")
    return "\n".join(lines)


def dot(nodes: Iterable[Node]) -> str:
    """The graph for Graphviz: ``dot -Tsvg``; an arrow says at which iteration a branch leaves its trunk."""
    lines = ["digraph sweep {", "  rankdir=LR", "  node [shape=box, style=filled, fillcolor=white]"]
    for node in nodes:
        # JSON's quotes and escapes are also Graphviz's.
        label = json.dumps(f"{_name(node)}\n{_what(node)}", ensure_ascii=False)
        colour = _COLOURS.get(node.kind)
        lines.append(
            f"  {json.dumps(node.id)} [label={label}" + (f", fillcolor={colour}]" if colour else "]")
        )
        for parent in node.parents:
            at = f' [label="{node.start:,}"]' if parent == node.branch_from else ""
            lines.append(f"  {json.dumps(parent)} -> {json.dumps(node.id)}{at}")
    return "\n".join([*lines, "}"])


def _name(node):
    return node.id if node.selected else node.id + _MARK


def _span(node):
    """From where to where, and how many iterations that is."""
    return node.start, node.start + node.iterations, node.iterations


def _what(node):
    start, end, iterations = _span(node)
    return f"{node.kind} {start:,} -> {end:,}" if iterations else node.kind


def _ancestors(id, known):
    """A node and all that come before it."""
    return {id}.union(*(_ancestors(parent, known) for parent in known[id].parents))
