"""What a rule says, and what it looks at."""

from dataclasses import dataclass

from ..modeling.inspection import NORM_KEYS

# The parts that a backbone without its neck can be.
BODY = ("backbone", "backbone.bottom_up")
DETECTORS = ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "PanopticFPN")


@dataclass(frozen=True)
class Problem:
    """One thing that does not belong together.

    Attributes:
        key (str): the config key to look at.
        message (str): what is wrong.
        cure (str): what to do about it.
        level (str): "error" or "warning".
    """

    key: str
    message: str
    cure: str
    level: str = "error"

    def __str__(self):
        return " ".join(f"{self.key}: {self.message}; {self.cure}".split())


@dataclass(frozen=True)
class Subject:
    """What the rules look at: config, processes, the model it builds (None: it cannot), its norms."""

    cfg: object
    world_size: int
    model: object
    parts: dict

    @property
    def group(self):
        """Images per pass of one process, for a config that is not resolved too."""
        solver = self.cfg.SOLVER
        return solver.IMS_PER_GROUP or max(1, solver.IMS_PER_BATCH // self.world_size)

    @property
    def scratch(self):
        """Whether training starts from no weights."""
        return self.cfg.MODEL.WEIGHTS == ""

    @property
    def detector(self):
        """Whether the model is a detector, not an image classifier."""
        return self.cfg.MODEL.META_ARCHITECTURE in DETECTORS

    @property
    def body(self):
        """The kinds of normalization in the backbone without its neck."""
        return set().union(*(self.parts.get(part, ()) for part in BODY))

    @property
    def body_group(self):
        """The config group below MODEL that describes the backbone without its neck."""
        return "VGG" if "vgg" in self.cfg.MODEL.BACKBONE.NAME else "RESNETS"

    def norm_key(self, part):
        """The key that sets the normalization of a part of the model."""
        return f"MODEL.{self.body_group}.NORM" if part in BODY else NORM_KEYS.get(part, "MODEL")
