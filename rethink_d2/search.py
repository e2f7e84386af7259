"""Search of hyper-parameters by grid: ``python -m rethink_d2.search --config-file ... --output DIR``.

The paper (section 5.2) searches anew where little data makes the settings for 118k images overfit; for 35k
images it finds a starting rate of 0.04, a decay factor of 0.02 and scale augmentation (footnote 2). It does
not say what else it tried. The grid here, unless ``--grid`` gives another one:

====================  ==============================================================================
SOLVER.BASE_LR        0.02, 0.04
SOLVER.GAMMA          0.1, 0.05, 0.02
INPUT.MIN_SIZE_TRAIN  800 alone; 640 to 800; 512 to 800; in steps of 32
SOLVER.SCHEDULE       those of the config's curve in the paper's manifest; for other configs their own
====================  ==============================================================================

That is 18 trials per length: 90 for 35k images (2x to 6x), 54 for 10k (40k, 60k, 80k), 18 for 1k. A key that
is given as ``KEY VALUE`` is the same in every trial and leaves the default grid.

Each trial is a run of ``rethink_d2.train`` in ``DIR/trials/<digest>``, named after what it computes. The
optuna journal ``DIR/journal.log`` lists those that have ended. If it is lost, or the grid changes, finished
trials are read again from their folders; to run failed ones once more, delete it. Several searches on the
same DIR divide the trials among themselves: on machines that share it, or with other CUDA_VISIBLE_DEVICES.
"""

import argparse
import contextlib
import csv
import fcntl
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import optuna
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState, create_trial
from tabulate import tabulate

from . import model_zoo, paper, recipe
from . import train as training
from .files import read_json, write_atomically
from .preemption import EXIT_CODE, Preemption

__all__ = ["Search", "Trial", "default_grid", "parse_grid", "run_training"]

REFUSED = 2
SCALES = ("(800,)", str(tuple(range(640, 801, 32))), str(tuple(range(512, 801, 32))))


@dataclass(frozen=True)
class Trial:
    """One point of the grid.

    Attributes:
        point (dict[str, str]): value by config key, as on the command line.
        folder (str): the run folder.
        arguments (list[str]): of ``rethink_d2.train``.
        iterations (int): its length.
        dataset (str): the data set whose metric counts.
    """

    point: dict
    folder: str
    arguments: list
    iterations: int
    dataset: str

    @property
    def digest(self):
        """Names what the trial computes."""
        return os.path.basename(self.folder)

    def __str__(self):
        return ", ".join(f"{key} {value}" for key, value in self.point.items())


def default_grid(config_file, opts=()):
    """The grid of the module's docstring.

    Args:
        config_file (str): the config of the trials.
        opts (Sequence[str]): alternating keys and values that all trials share; they leave the grid.

    Returns:
        dict[str, tuple[str, ...]]: values by config key.
    """
    run = paper.for_config(config_file)
    curve = (run.family, run.arm, "train") if run else None
    lengths = [r.schedule for r in paper.load() if (r.family, r.arm, r.kind) == curve]
    own = recipe.load(config_file, opts).SOLVER.SCHEDULE
    grid = {
        "SOLVER.BASE_LR": ("0.02", "0.04"),
        "SOLVER.GAMMA": ("0.1", "0.05", "0.02"),
        "INPUT.MIN_SIZE_TRAIN": SCALES,
        "SOLVER.SCHEDULE": tuple(lengths) or (own,),
    }
    return {key: values for key, values in grid.items() if key not in opts[::2] and values != ("",)}


def parse_grid(items):
    """Read ``KEY=V1|V2|V3`` arguments.

    Raises:
        ValueError: one is not of that form, or its key is given twice.
    """
    grid = {}
    for item in items:
        key, _, text = item.partition("=")
        values = tuple(value.strip() for value in text.split("|"))
        if not key or not all(values):
            raise ValueError(f"--grid {item}: write KEY=V1|V2, e.g. --grid 'SOLVER.BASE_LR=0.02|0.04'")
        if key in grid:
            raise ValueError(f"--grid {key} is given twice; put all its values into one")
        grid[key] = values
    return grid


def run_training(arguments, claim):
    """Train in a process of its own, and hand a request to stop on to it.

    Args:
        arguments (list[str]): of ``rethink_d2.train``.
        claim (int): the open file that :func:`claimed` yields. The training holds it too, so that nobody else
            takes the trial while a training lives on whose search was killed.

    Returns:
        int: the exit code; 75 whenever this process was asked to stop.
    """
    command = [sys.executable, "-m", "rethink_d2.train", *arguments]
    with Preemption() as preemption, subprocess.Popen(command, pass_fds=(claim,)) as child:
        while child.poll() is None and not preemption.requested:
            time.sleep(0.2)
        if preemption.requested:
            # After Ctrl-C in a terminal too, which reaches the child by itself: this is no second Ctrl-C.
            child.terminate()
        child.wait()
    return EXIT_CODE if preemption.requested else child.returncode


@contextlib.contextmanager
def claimed(folder):
    """Be the only one who runs a trial, by a lock that goes with its holders, however they end.

    Yields:
        int or None: the open file that holds the lock; None where somebody else has it.
    """
    os.makedirs(folder, exist_ok=True)
    # Not filelock, which keeps the file to itself: the training must be able to hold it as well.
    with open(os.path.join(folder, ".claim"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = True
        except BlockingIOError:
            mine = False
        yield file.fileno() if mine else None


class Search:
    """A grid of trials, and what is known of them.

    Args:
        config_file (str): the config that the trials change.
        output (str): folder of the search.
        grid (dict[str, Sequence[str]] or None): values by config key; None for :func:`default_grid`.
        opts (Sequence[str]): alternating keys and values that all trials share.
        num_gpus (int): processes per trial.
        metric (str): what to maximize, as ``results.json`` names it.

    Raises:
        ValueError: a key or value that does not exist, fit or belong into a grid, in any trial.
    """

    def __init__(self, config_file, output, *, grid=None, opts=(), num_gpus=1, metric="bbox/AP"):
        self.config_file, self.output, self.opts, self.metric = config_file, output, list(opts), metric
        self.grid = default_grid(config_file, self.opts) if grid is None else grid
        for key in self.grid:
            if key in self.opts[::2]:
                raise ValueError(f"{key} is in the grid and an override; give it in one place")
            if recipe.classify(key) == "free":
                raise ValueError(f"--grid {key}: it does not change what is trained")
        if "OUTPUT_DIR" in self.opts[::2]:
            raise ValueError("OUTPUT_DIR: every trial gets a folder of its own below --output")
        points = (dict(zip(self.grid, p, strict=True)) for p in itertools.product(*self.grid.values()))
        trials = [self._trial(point, num_gpus) for point in points]
        # "0.1" and "0.10" are one trial.
        self.trials = list({trial.digest: trial for trial in reversed(trials)}.values())[::-1]

    def _overrides(self, point):
        return [*self.opts, *itertools.chain.from_iterable(point.items())]

    def _trial(self, point, num_gpus):
        # A free port for each, because searches on one machine may run at the same time.
        arguments = ["--resume", "--config-file", self.config_file, "--num-gpus", str(num_gpus)]
        arguments += ["--dist-url", "auto", *self._overrides(point)]
        cfg = training.prepare(training.argument_parser().parse_args(arguments))
        if not cfg.DATASETS.TEST:
            raise ValueError("DATASETS.TEST is empty, but the search needs a data set to judge by")
        folder = os.path.join(self.output, "trials", recipe.identity(cfg)[:12])
        arguments += ["OUTPUT_DIR", folder]
        return Trial(point, folder, arguments, cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST[0])

    def _study(self):
        """The journal's study of this grid and metric."""
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        os.makedirs(self.output, exist_ok=True)
        # Absolute, because optuna's lock is a link to it and looks where it leads.
        journal = os.path.abspath(os.path.join(self.output, "journal.log"))
        try:
            store = JournalStorage(JournalFileBackend(journal))
        except ValueError as e:
            raise ValueError(f"{journal} is damaged ({e}); delete it: no finished trial is lost") from e
        what = json.dumps([self.metric, self.grid, [trial.digest for trial in self.trials]])
        name = f"{os.path.basename(self.config_file)} {hashlib.sha256(what.encode()).hexdigest()[:12]}"
        return optuna.create_study(study_name=name, storage=store, direction="maximize", load_if_exists=True)

    def run(self, train=run_training):
        """Run every trial that is neither finished nor run by somebody else, then write what was found.

        Trials enter the journal when they have ended, so that one whose search was killed is simply open.
        (Neither optuna's GridSampler nor its queue does that: in a journal both leave it running for ever,
        and the sampler gives several processes the same point.)

        Args:
            train (callable): as :func:`run_training`.

        Returns:
            int: 0; 1 where all trials have failed; 2 where one was refused, 75 where one was asked to stop.

        Raises:
            ValueError: the journal is damaged, or a finished trial has no such metric.
        """
        study = self._study()
        found_open = True
        # Once more after the last one, for trials that others have left meanwhile.
        while found_open:
            found_open = False
            for trial in self.trials:
                with claimed(trial.folder) as claim:
                    left = len(self.trials) - len(ended := _ended(study))
                    if claim is None or trial.digest in ended:
                        continue
                    found_open = True
                    print(f"{left} of {len(self.trials)} trials left; {trial.digest}: {trial}", flush=True)
                    code = self._run_one(study, trial, train, claim)
                if code in (REFUSED, EXIT_CODE):
                    why = "was refused" if code == REFUSED else "was asked to stop; the same command goes on"
                    print(f"the search stops: {trial.folder} {why}", file=sys.stderr)
                    return code
        return self._conclude(_ended(study))

    def _run_one(self, study, trial, train, claim):
        """Train a trial, unless its folder is that of a finished run, and note how it ended."""
        done = read_json(os.path.join(trial.folder, "run.json"), {}).get("state") == "done"
        code = 0 if done else train(trial.arguments, claim)
        if code in (REFUSED, EXIT_CODE):
            return code
        value = self._value(trial) if code == 0 else None
        study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if code == 0 else TrialState.FAIL,
                value=value,
                params=trial.point,
                distributions={key: CategoricalDistribution(self.grid[key]) for key in trial.point},
                user_attrs={"digest": trial.digest, "exit_code": code},
            )
        )
        print(f"{self.metric} {value:.2f}" if code == 0 else f"failed with exit code {code}", flush=True)
        return code

    def _value(self, trial):
        """The metric at the end of a trial; 0 where nothing was detected."""
        path = os.path.join(trial.folder, "results.json")
        last = ([row for row in read_json(path, []) if row["dataset"] == trial.dataset] or [{}])[-1]
        if self.metric not in last:
            known = ", ".join(key for key in last if key not in ("iteration", "dataset")) or "nothing"
            raise ValueError(f"--metric {self.metric}: {path} has for {trial.dataset}: {known}")
        return last[self.metric] or 0.0

    def _conclude(self, ended):
        """Print and write the table; write the best config once no trial is open."""
        values = {trial.digest: None for trial in self.trials} | {d: t.value for d, t in ended.items()}
        trials = sorted(self.trials, key=lambda t: (values[t.digest] is None, -(values[t.digest] or 0)))
        states = {digest: trial.state.name.lower() for digest, trial in ended.items()}
        rows = [[*t.point.values(), values[t.digest], states.get(t.digest, "open"), t.digest] for t in trials]
        headers = [*self.grid, self.metric, "state", "trial"]
        words = [*range(len(self.grid)), len(headers) - 1]
        print(tabulate(rows, headers=headers, floatfmt=".2f", disable_numparse=words))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([headers, *rows])
        write_atomically(os.path.join(self.output, "trials.csv"), text.getvalue())

        if still_open := len(self.trials) - len(ended):
            print(f"{still_open} trials are still run by other processes; the last to end writes the best")
            return 0
        value = values[trials[0].digest]
        if value is None:
            print("error: all trials failed, so there is no best", file=sys.stderr)
            return 1
        path = os.path.join(self.output, "best.yaml")
        write_atomically(path, self._best_config(trials[0], value))
        print(f"best: {trials[0]}\n  {path}")
        return 0

    def _best_config(self, trial, value):
        """A config that repeats a trial, as text."""
        base = recipe.flatten(recipe.load(self.config_file, []))
        found = recipe.flatten(recipe.load(self.config_file, self._overrides(trial.point)))
        tree = {"_BASE_": os.path.abspath(self.config_file)}
        for key, now in found.items():
            if now != base[key] and recipe.classify(key) != "free":
                *path, last = key.split(".")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[last] = json.loads(json.dumps(now))  # YAML has no tuples
        grid = "".join(f"#   {key}: {' | '.join(values)}\n" for key, values in self.grid.items())
        text = yaml.safe_dump(tree, default_flow_style=None, sort_keys=False, width=10_000)
        return (
            f"# Best of {len(self.trials)} trials by {self.metric} on {trial.dataset}: {value:.2f}\n"
            f"# python -m rethink_d2.search tried\n{grid}# and trained this one in {trial.folder}\n{text}"
        )

    def dry_run(self):
        """Print every trial and how it stands; writes nothing."""
        rows = []
        for trial in self.trials:
            state = read_json(os.path.join(trial.folder, "run.json"), {}).get("state", "")
            rows.append([*trial.point.values(), f"{trial.iterations:,}", state, trial.digest])
        headers = [*self.grid, "iterations", "state", "trial"]
        print(tabulate(rows, headers=headers, disable_numparse=True))
        total = sum(trial.iterations for trial in self.trials)
        print(f"{len(self.trials)} trials, {total:,} iterations")


def _ended(study):
    """The trials in the journal, as optuna has them, by digest."""
    return {trial.user_attrs["digest"]: trial for trial in study.get_trials(deepcopy=False)}


def argument_parser():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.search",
        description=__doc__.replace("``", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    base = parser.add_mutually_exclusive_group(required=True)
    base.add_argument("--config-file", metavar="FILE", help="the config that the trials change")
    base.add_argument("--run", metavar="ID", help="its id in the manifest, e.g. search-coco35k-pretrained")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the search")
    parser.add_argument(
        "--grid",
        metavar="KEY=V1|V2",
        action="append",
        help="values to try, quoted for the shell; repeat it for more keys; replaces the default grid",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes per trial")
    parser.add_argument("--metric", default="bbox/AP", help="what to maximize (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the trials; write nothing")
    parser.add_argument("opts", metavar="KEY VALUE", nargs="...", help="for all trials, e.g. SEED 2")
    return parser


def config_of(id):
    """The config file of a run of the paper; ValueError where there is no such run, or it has none."""
    try:
        run = paper.find(id)
    except KeyError as e:
        raise ValueError(f"--run: {e.args[0]}") from e
    if not run.config:
        raise ValueError(f"--run {id} is computed from other runs, so there is nothing to search")
    return model_zoo.get_config_file(run.config)


def cli(argv=None, train=run_training):
    """The command line; returns what :meth:`Search.run` returns, and 2 for wrong arguments."""
    args = argument_parser().parse_args(argv)
    try:
        config_file = args.config_file or config_of(args.run)
        grid = parse_grid(args.grid) if args.grid else None
        options = {"opts": args.opts, "num_gpus": args.num_gpus, "metric": args.metric}
        search = Search(config_file, args.output, grid=grid, **options)
        if args.dry_run:
            search.dry_run()
            return 0
        return search.run(train)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return REFUSED


if __name__ == "__main__":
    sys.exit(cli())
