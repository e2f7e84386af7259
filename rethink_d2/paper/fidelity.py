"""docs/fidelity.md: every setting with its source, and what is left open."""

from detectron2.config import get_cfg

from .. import recipe
from . import settings
from .check import RULES
from .manifest import load

HEAD = """\
# Fidelity

What the paper, or the Detectron that it ran on, says; what the configs have; what Detectron2 would do by
default. The column "runs" says which runs of the manifest a row is about: patterns of `family/arm/kind`, of
which one must fit (`!`: must not fit). Where two rows are about a run and a key, the later one counts.

`python -m rethink_d2.paper check` holds every row and every relation against the resolved configs; a key that
is neither named here nor at Detectron2's default fails it too. This file is printed by
`python -m rethink_d2.paper fidelity`.
"""

TAIL = """\
## What Detectron2 does otherwise

No key changes these; mind them where AP is compared.

- Boxes: Detectron counts the last pixel (width = x2 - x1 + 1), Detectron2 does not.
- Anchors: Detectron rounds them to whole pixels, Detectron2 does not.
- Masks are pasted into the image in another way.
- Proposals: Detectron keeps 2000 of two images together, Detectron2 a number of each image.
- Keypoints: Detectron discards a minibatch with fewer than 20 labelled keypoints (core/config.py
  KRCNN.MIN_KEYPOINT_COUNT_FOR_VALID_MINIBATCH), Detectron2 trains on it.

Detectron2's own Detectron-style R50-FPN 1x has box AP 37.8 against Detectron's 37.7, but mask AP 34.9
against 33.9 (Detectron2 MODEL_ZOO).

## What is published nowhere, and what was chosen

- Lengths below 2x. The paper's rule (last 60k, last 20k) is for the schedules from 2x up. Shorter runs
  have the drops of 2x in proportion, at 6/9 and 8/9: VOC's usual 12k and 16k of 18k, 40k and 53.3k of
  60k.
- Lengths that the paper does not name: those of 118k images for 35k; around the named ones for 10k; for
  3.5k and 1k see the table.
- Settings for 10k, 3.5k and 1k images: the paper searched again and does not say what it found. They are
  those of 35k; the manifest's `search-*` rows repeat the searches. `coco1k-searched` waits for the result
  of one.
- Subsets: images are ranked by a keyed hash of their id, so 1k is part of 3.5k, and that of 10k. 35k is
  val35k itself, which does not contain them.
- VOC: "trainval2007+train2012" is 10,728 images; "15k" is 15,680 with test2007. The names count, and
  `voc-15k` is the other reading. Difficult objects are left out of training as in Detectron; Detectron2
  trains on them.
- X152 "8x32d": 8 groups of 32 channels, by the paper's count of FLOPs. Its weights with GN are not
  public, nor are VGG-16's in Detectron's format: own pre-training makes them (last table of settings).
- VGG-16: RoIAlign, as in all other runs, where the original Faster R-CNN has RoIPool; no dropout, as
  Detectron.
- Cascade, random weights: the run is as long as the one without cascade, so the cascade begins at 540k.
  Backbone, FPN, RPN, mask head and the optimizer's state go on; each stage's box head starts from the one
  there was, predictors afresh; there is no second warm-up. The mask head trains on the boxes that enter
  the last stage. With pre-training the cascade is there throughout.
- SyncBN: in FPN and heads too, as Detectron2 has it. The pre-trained arm starts from torchvision's
  ResNet-50, which still has its statistics; both arms see its pixels. Freezing stem and res2 makes
  FrozenBN of their norms, as always in Detectron2.
- Keypoints: scales 640 to 800, as all of Detectron's keypoint configs.
- Initial weights of the body: MSRA, although Detectron's GN body, by omission, has Xavier (policy
  `detectron`).
- ImageNet pre-training: crops and flips without colours; the scale of each residual block's last norm
  starts from 1, as in the detectors, not from 0.
"""


def document() -> str:
    """The text of docs/fidelity.md, Markdown."""
    defaults = recipe.flatten(get_cfg())
    groups = {}
    for setting in settings.load():
        groups.setdefault(setting.group, []).append(setting)
    parts = [HEAD]
    for group, rows in groups.items():
        parts.append(f"## {group}\n\n{_settings(rows, defaults)}\n")
    return "\n".join([*parts, f"## Relations\n\n{_rules()}\n", TAIL]).rstrip()


def _settings(rows, defaults):
    head = ["runs", "the paper or Detectron", "here", "Detectron2's default", "source", "choice"]
    return _table(
        head,
        [
            [
                f"`{row.scope}`",
                row.what,
                f"`{row.key}` = `{_show(row.value)}`",
                f"`{_show(defaults[row.key])}`" if row.key in defaults else "own key",
                row.source,
                row.choice,
            ]
            for row in rows
        ],
    )


def _rules():
    runs = [run for run in load() if run.config]
    rows = [[rule.what, rule.source, str(sum(map(rule.applies, runs)))] for rule in RULES]
    return _table(["what holds", "source", "runs"], rows)


def _show(value):
    """A value as it is written in a config, tuples as lists."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_show, value))}]"
    return '""' if value == "" else str(value)


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
