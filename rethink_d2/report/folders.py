"""One run folder as it is: finished, running, failed, half written.

Nothing here raises for what a file holds: what cannot be read is left out, and named in a list of problems.
"""

import ast
import dataclasses
import json
import os
import re
from collections import Counter

import yaml

from .. import paper, recipe
from ..files import read_json
from ..solver.schedule import ONE_X, REFERENCE_BATCH
from ..sweep.state import TRAINING_LOCK, State, held, last_error

__all__ = [
    "READ",
    "Evaluation",
    "RunFolder",
    "careful",
    "is_number",
    "metrics_rows",
    "read_folder",
]

# What a page depends on, in a run folder.
READ = ("run.json", "results.json", "metrics.json", "config.yaml", "launch.json")
# The end of metrics.json that tells how far a run is, in bytes.
TAIL = 1 << 14
# What tells the size of a run.
SIZE = ("SOLVER.ONE_X", "DATASETS.TEST")
KNOWN = {run.id: run for run in paper.load()}
# What Detectron2 has no number for where nothing was detected.
NO_DETECTIONS = ("/AP", "/AP50", "/AP75")
STATES = {"done": State.FINISHED, "failed": State.FAILED, "preempted": State.PREEMPTED}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # five times as fast, where PyYAML has it
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError)


def is_number(value):
    """Whether a value from a file is a finite number, and no absurd one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One row of results.json.

    Attributes:
        iteration: number of iterations done.
        dataset: name of the data set.
        metrics: by Detectron2's names, 0-100; without those that are not known.
    """

    iteration: int
    dataset: str
    metrics: dict[str, float]


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """One run folder, or a planned run that has none yet.

    Attributes:
        path: below the output folder, with forward slashes.
        run_id: by run.json, else by the folder's name.
        seed: None if unknown.
        run: the manifest's row; None for a run that is not the paper's.
        state: as of :mod:`rethink_d2.sweep.state`.
        note: why it has failed, or where it waits.
        record: run.json.
        config: value by dotted key.
        evaluations: one per iteration, ascending.
        iteration: how many are done.
        left: seconds until the end; None if unknown.
        files: names of what it holds.
    """

    path: str
    run_id: str
    seed: int | None
    run: paper.Run | None
    state: State
    note: str
    record: dict
    config: dict
    evaluations: tuple[Evaluation, ...]
    iteration: int
    left: float | None
    files: frozenset[str]

    @property
    def max_iter(self) -> int:
        """Length in iterations; 0 if unknown."""
        return self._positive("SOLVER.MAX_ITER", 0)

    @property
    def batch(self) -> int:
        """Images per iteration."""
        return self._positive("SOLVER.IMS_PER_BATCH", REFERENCE_BATCH)

    @property
    def one_x(self) -> float:
        """What 1x means, in iterations of this run."""
        return self._positive("SOLVER.ONE_X", ONE_X) * REFERENCE_BATCH / self.batch

    @property
    def drops(self) -> list[int]:
        """Iterations at which the rate drops."""
        steps = self.config.get("SOLVER.STEPS")
        return [step for step in steps if is_number(step)] if isinstance(steps, list) else []

    @property
    def mini(self) -> bool:
        """Whether it is in miniature: its numbers are not comparable with the paper's."""
        test = self.config.get("DATASETS.TEST") or [row.dataset for row in self.evaluations]
        glyphs = isinstance(test, (list, tuple)) and any(str(name).startswith("glyphs_") for name in test)
        return glyphs or self._positive("SOLVER.ONE_X", ONE_X) != ONE_X

    @property
    def unit(self) -> int | None:
        """What 1x means, in iterations of 16 images; None if unknown, as of miniatures of pre-training."""
        one_x = self._positive("SOLVER.ONE_X", ONE_X)
        told = one_x != ONE_X if self.mini else self.config or self.evaluations
        return one_x if told else None

    @property
    def final(self) -> Evaluation | None:
        """The evaluation after the last iteration."""
        last = self.evaluations[-1] if self.evaluations else None
        if last and self.record and self.max_iter:  # without a record nothing was trained
            return last if last.iteration >= self.max_iter else None
        return last if self.state is State.FINISHED else None

    def _positive(self, key, default):
        value = self.config.get(key)
        return value if isinstance(value, int) and is_number(value) and value > 0 else default


def careful(read, name, problems, default):
    """What `read()` returns; `default` where a file is missing or damaged.

    Args:
        read (callable): without arguments.
        name (str): of the file, for the line that is added to `problems` if it is damaged.
        problems (list[str]): lines so far.
        default (object): returned instead.
    """
    try:
        return read()
    except FileNotFoundError:
        return default
    except _DAMAGE as e:
        problems.append(f"{name} cannot be read: {type(e).__name__}: {' '.join(str(e).split())[:200]}")
        return default


def read_folder(out, path, node, look, problems):
    """Read one run folder.

    Args:
        out (str): the output folder.
        path (str): of the run folder below it.
        node (Node or None): of a sweep's plan.
        look (Progress or None): as the sweep sees it.
        problems (list[str]): gets a line for everything that is damaged.

    Returns:
        RunFolder
    """
    folder = os.path.join(out, path)

    def read(name, function, kind):
        value = careful(lambda: function(os.path.join(folder, name)), f"{path}/{name}", problems, kind())
        if isinstance(value, kind):
            return value
        problems.append(f"{path}/{name} cannot be read: it is no {kind.__name__}")
        return kind()

    record = read("run.json", lambda file: read_json(file, {}), dict)
    config = read("config.yaml", _config, dict) or (_planned_size(node) if node else {})
    rows = read("results.json", lambda file: read_json(file, []), list)
    evaluations = _evaluations(rows, f"{path}/results.json", problems)
    newest = metrics_rows(folder, TAIL, f"{path}/metrics.json", problems)
    begun = look and look.state is not State.WAITING
    done = [row.iteration for row in evaluations] + [row["iteration"] + 1 for row in newest]
    state = look.state if look else _state(folder, record, evaluations)
    note = look.note if look else ""
    if state in (State.FAILED, State.INTERRUPTED) and not note:
        note = careful(lambda: last_error(folder), path, problems, "")
    run_id, seed = _names(folder, record, node)
    return RunFolder(
        path=path,
        run_id=run_id,
        seed=seed,
        run=KNOWN.get(run_id),
        state=state,
        note=note,
        record=record,
        config=config,
        evaluations=evaluations,
        iteration=max([*done, look.iteration if begun else 0]),
        left=look.left if look else None,
        files=careful(lambda: frozenset(os.listdir(folder)), path, problems, frozenset()),
    )


def _names(folder, record, node):
    """Run id and seed: by the record, by the plan, by the folder ``<run id>/seed<k>``."""
    *_, parent, name = ("", *os.path.abspath(folder).split(os.sep))
    numbered = re.fullmatch(r"seed(\d{1,9})", name)
    run_id = record.get("run_id") or (node.run.id if node else parent if numbered else name)
    seed = record.get("seed", int(numbered[1]) if numbered else None)
    return str(run_id), seed if isinstance(seed, int) else None


def _config(path):
    with open(path, encoding="utf-8") as f:
        tree = yaml.load(f, _LOADER)
    return recipe.flatten(tree) if isinstance(tree, dict) else tree


def _planned_size(node):
    """What a plan tells of the size of a run that has no config yet."""
    options = {SIZE[0]: str(ONE_X), **dict(zip(node.options[::2], node.options[1::2], strict=False))}
    try:
        return {key: ast.literal_eval(options[key]) for key in SIZE if key in options}
    except (ValueError, TypeError, SyntaxError):  # as a user has written it
        return {}


def _state(folder, record, evaluations):
    """The state of a run that no sweep has planned."""
    if held(os.path.join(folder, TRAINING_LOCK)):
        return State.RUNNING
    if not record:
        return State.FINISHED if evaluations else State.WAITING
    return STATES.get(str(record.get("state")), State.INTERRUPTED)


def _evaluations(rows, name, problems):
    """One row per iteration: where there are several data sets, of the one that is evaluated least often,
    as that is the larger one which only the end of a run is judged by; of equals the first."""
    read = []
    for row in rows:
        row = row if isinstance(row, dict) else {}
        iteration, dataset = row.get("iteration"), row.get("dataset")
        if isinstance(iteration, int) and is_number(iteration) and isinstance(dataset, str):
            read.append(Evaluation(iteration, dataset, _numbers(row)))
    if len(read) < len(rows):
        problems.append(f"{name}: {len(rows) - len(read)} of {len(rows)} rows have no iteration or data set")
    often, chosen = Counter(row.dataset for row in read), {}
    for row in sorted(read, key=lambda row: (row.iteration, often[row.dataset])):
        chosen.setdefault(row.iteration, row)
    return tuple(chosen.values())


def _numbers(row):
    """The metrics of an evaluation. Where nothing is detected Detectron2 has no number; the AP is 0."""
    numbers = {key: value for key, value in row.items() if is_number(value) and key != "iteration"}
    nothing = [key for key, value in row.items() if value is None and key.endswith(NO_DETECTIONS)]
    return dict.fromkeys(nothing, 0.0) | numbers


def metrics_rows(folder, tail=None, name="", problems=None):
    """The rows of metrics.json.

    Args:
        folder (str): the run folder.
        tail (int or None): read only so many bytes at the end.
        name (str), problems (list[str] or None): where to say that lines are damaged. A last line that is
            torn is none: it is being written.

    Returns:
        list[dict]: each has an int under "iteration"; none if there is no file.
    """
    path = os.path.join(folder, "metrics.json")
    problems = [] if problems is None else problems

    def read():
        with open(path, "rb") as f:
            begin = max(0, os.path.getsize(path) - tail) if tail else 0
            f.seek(begin)
            return f.readlines()[1 if begin else 0 :]

    lines, rows = careful(read, name, problems, []), []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("iteration"), int) and is_number(row["iteration"]):
            rows.append(row)
        elif number < len(lines):
            problems.append(f"{name}: a line is damaged, and left out")
    return rows
