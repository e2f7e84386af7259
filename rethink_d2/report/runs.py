"""All runs of an output folder, and which of them stand for which run of the paper."""

import functools
import os
from collections import defaultdict
from collections.abc import Callable

from .. import paper, recipe
from ..sweep.state import PLAN, State, planned, progress, queue
from .folders import RunFolder, careful, is_number, metrics_rows, read_folder
from .sizes import one_size

__all__ = ["Runs", "find_runs", "walk"]

# Trials of a search carry the id of the run that they search for.
LEFT_OUT = ("trials", "report")


class Runs:
    """All runs of an output folder.

    Args:
        out (str): the folder.
        folders (list[RunFolder]): in it.
        problems (list[str]): what could not be read, one line each.
        left_out (str): a line about runs of another size; "" where there is none.
    """

    def __init__(self, out, folders, problems, left_out=""):
        self.out, self.folders, self.problems, self.left_out = out, folders, problems, left_out
        self._by_path = {folder.path: folder for folder in folders}
        self._seeds = self._of_the_paper()

    def seeds(self, run: paper.Run) -> list[RunFolder]:
        """The folders of one run of the paper, one per seed."""
        return self._seeds.get(run.id, [])

    def finals(self, run: paper.Run, metric: str) -> list[float]:
        """A metric after the last iteration, of every seed that got there."""
        rows = [folder.final for folder in self.seeds(run)]
        return [row.metrics[metric] for row in rows if row and metric in row.metrics]

    @property
    def miniature(self) -> bool:
        """Whether the paper's runs are in miniature here: all of them, or none."""
        return any(folder.mini and folder.run for folder in self.folders)

    def mini(self, run: paper.Run) -> bool:
        """Whether a run was run in miniature."""
        return any(folder.mini for folder in self.seeds(run))

    def curve(self, folder: RunFolder, metric: str) -> dict[int, float]:
        """A metric by iterations done; of a branch also what its trunk has measured before."""

        def own(one):
            return {e.iteration: e.metrics[metric] for e in one.evaluations if metric in e.metrics}

        return self._with_trunk(folder, own)

    def losses(self, folder: RunFolder) -> dict[int, float]:
        """The training loss by iterations done, as Detectron2's writer smooths it: the median of 20."""

        def own(one):
            rows = metrics_rows(os.path.join(self.out, one.path))
            return {r["iteration"] + 1: r["total_loss"] for r in rows if is_number(r.get("total_loss"))}

        return self._with_trunk(folder, own)

    def _with_trunk(self, folder, own: Callable, seen=()):
        rows, trunk = {}, self.trunk(folder)
        if trunk and trunk.path not in seen:
            begun = folder.record["parent"].get("iteration")
            before = self._with_trunk(trunk, own, (*seen, folder.path))
            rows = {i: value for i, value in before.items() if is_number(begun) and i <= begun}
        return dict(sorted((rows | own(folder)).items()))

    def trunk(self, folder: RunFolder) -> RunFolder | None:
        """The run that a branch started from, if it is in the output folder."""
        parent = folder.record.get("parent")
        if not isinstance(parent, dict):
            return None
        # Looked up, not opened: the path is what a file says.
        path = os.path.normpath(os.path.join(folder.path, str(parent.get("folder"))))
        named = [f for f in self.folders if (f.run_id, f.seed) == (parent.get("run_id"), folder.seed)]
        return self._by_path.get(path.replace(os.sep, "/")) or (named[0] if named else None)

    def _of_the_paper(self):
        """Folders by id of the run: of one seed only the furthest."""
        found, chosen = defaultdict(list), {}
        for folder in self.folders:
            if folder.run:
                found[folder.run.id].append(folder)
        for id, folders in found.items():
            begun = [f for f in folders if f.state is not State.WAITING] or folders
            best = {}
            for folder in sorted(begun, key=lambda f: (f.final is None, -f.iteration, f.path)):
                if best.setdefault(folder.seed, folder) is not folder:
                    other = best[folder.seed].path
                    self.problems.append(f"{folder.path} repeats {other}: in the table of runs only")
            chosen[id] = sorted(best.values(), key=lambda f: (f.seed is None, f.seed))
            self._compare(chosen[id])
        return chosen

    def _compare(self, folders):
        """Seeds of one run are to differ in nothing else."""
        known = [folder for folder in folders if folder.config]
        for folder in known[1:]:
            one, other = known[0].config, folder.config
            keys = [
                key
                for key in sorted(one.keys() | other.keys())
                # Pre-trained weights have a seed of their own.
                if recipe.classify(key) == "trajectory" and key not in ("SEED", "MODEL.WEIGHTS")
                if one.get(key) != other.get(key)
            ]
            if keys:
                self.problems.append(
                    f"{known[0].path} and {folder.path} differ in more than the seed: {', '.join(keys[:5])}"
                )


def walk(out):
    """The folders below an output folder that may hold runs; links to other folders are not followed.

    Yields:
        tuple[str, list[str]]: path and names of files.
    """
    for folder, inner, files in os.walk(out):
        inner[:] = sorted(name for name in inner if name not in LEFT_OUT and not name.startswith("."))
        yield folder, files


def find_runs(out: str, one_x: int | None = None) -> Runs:
    """Read all run folders below an output folder, and the plans of its sweeps.

    Args:
        out: the output folder.
        one_x: read those of which 1x is so many iterations; None for those that :func:`one_size` takes.

    Raises:
        ValueError: there is no run in it.
    """
    problems, found, jobs = [], {}, None
    for folder, files in walk(out):
        path = _clean(os.path.relpath(folder, out))
        if "run.json" in files or "results.json" in files:
            found.setdefault(path, (None, None))
        if PLAN in files:
            jobs = queue() or {} if jobs is None else jobs
            plan = functools.partial(planned, folder)
            for node in careful(plan, _clean(f"{path}/{PLAN}"), problems, []):
                look = functools.partial(progress, folder, node, jobs)
                name = _clean(f"{path}/{node.id}")
                if not name.startswith("../"):
                    found[name] = node, careful(look, name, problems, None)
    if not found:
        raise ValueError(f"{out} holds no run: no folder with a run.json or results.json, and no {PLAN}")
    read = [read_folder(out, path, *planned, problems) for path, planned in sorted(found.items())]
    read, left_out = one_size(out, read, one_x)
    return Runs(out, read, list(dict.fromkeys(problems)), left_out)


def _clean(path):
    return os.path.normpath(path).replace(os.sep, "/")
