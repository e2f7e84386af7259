"""Updates that are not finite, where a test wants them."""

import math

from detectron2.engine import HookBase

KINDS = ("nan loss", "inf loss", "nan gradient", "inf gradient")


def poison(trainer, iterations, kind):
    """Make the loss, or the gradient alone, not finite in some iterations.

    Args:
        trainer (Trainer): not yet started; of this process.
        iterations (Container[int]): which ones.
        kind (str): of :data:`KINDS`.
    """
    value, what = kind.split()
    factor = math.nan if value == "nan" else math.inf

    def active():
        return trainer.iter in iterations

    if what == "loss":
        trainer.model.register_forward_hook(
            lambda model, args, losses: {k: v * factor for k, v in losses.items()} if active() else losses
        )
    else:
        for parameter in trainer.model.parameters():
            parameter.register_hook(lambda gradient: gradient * factor if active() else gradient)


class States(HookBase):
    """Copies of all weights and momentum, by the number of iterations done."""

    def __init__(self):
        self.done = {}

    def _keep(self, done):
        model, optimizer = self.trainer.model, self.trainer.optimizer
        self.done[done] = {
            name: {"weight": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}}
            for name, p in model.named_parameters()
        }

    def before_train(self):
        self._keep(self.trainer.start_iter)

    def after_step(self):
        self._keep(self.trainer.iter + 1)
