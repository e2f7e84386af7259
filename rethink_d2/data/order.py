"""Which images make up which batch: a pure function of the data, a seed and the iteration.

Nothing here keeps a position, so a run can start at any iteration, with any number of processes and
loader workers, and still meets the images that an unbroken run meets there. All randomness is integer
hashing, so it does not depend on the version of a library's random generator either.
"""

import math

import numpy as np

__all__ = ["GroupOrder", "mix"]

# SplitMix64 (Steele, Lea, Flood 2014): every bit of the input changes half of the output's.
_GAMMA, _MUL_1, _MUL_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mix(*values):
    """Hash non-negative integers, or arrays of them, into uniform 64-bit numbers.

    Args:
        values (int or array): broadcast against each other; their order counts.

    Returns:
        np.ndarray: of uint64; of shape () for plain integers.
    """
    state = np.zeros(1, np.uint64)  # an array: numpy warns of overflow in scalars only
    for value in values:
        state = state + np.asarray(value, np.uint64) + np.uint64(_GAMMA)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MUL_1)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MUL_2)
        state = state ^ (state >> np.uint64(31))
    return state[0] if state.shape == (1,) and not any(np.ndim(v) for v in values) else state


class GroupOrder:
    """The endless sequence of groups of images that a run trains on.

    Every epoch is a permutation of the images. It is cut into groups of images of like orientation,
    whose order is shuffled; what is left of both kinds forms mixed groups. A still incomplete last group
    takes, in addition, the first images of the next epoch's permutation, so that every image comes
    once in every epoch and all groups are of one size.

    At most one epoch is held in memory, whatever position is asked for.

    Args:
        portrait (sequence[bool]): for every image, whether it is higher than wide. All alike where
            orientation should not count.
        group_size (int): images in a group.
        seed (int): of the run; not negative.
    """

    def __init__(self, portrait, group_size, seed):
        self._portrait = np.asarray(portrait, bool)
        if not len(self._portrait):
            raise ValueError("an order needs at least one image")
        self._size = group_size
        self._seed = seed
        self.groups_per_epoch = math.ceil(len(self._portrait) / group_size)
        self._epoch, self._groups, self._borrowed = None, None, 0

    def group(self, position):
        """The group at a position of the sequence.

        Args:
            position (int): from 0; iteration i of B groups has positions i * B to i * B + B - 1.

        Returns:
            list[tuple[int, int]]: index of the image and the epoch that it belongs to.
        """
        epoch, row = divmod(position, self.groups_per_epoch)
        if epoch != self._epoch:
            self._arrange(epoch)
        own = self._size - (self._borrowed if row == self.groups_per_epoch - 1 else 0)
        return [(int(i), epoch + (k >= own)) for k, i in enumerate(self._groups[row])]

    def _permutation(self, epoch):
        return np.argsort(mix(self._seed, epoch, 0, np.arange(len(self._portrait))), kind="stable")

    def _arrange(self, epoch):
        images = self._permutation(epoch)
        portrait = self._portrait[images]
        size, groups, left = self._size, [], []
        for of_a_kind in (images[~portrait], images[portrait]):
            whole = len(of_a_kind) // size * size
            groups.append(of_a_kind[:whole].reshape(-1, size))
            left.append(of_a_kind[whole:])
        left = np.concatenate(left)
        whole = len(left) // size * size
        groups = np.concatenate([*groups, left[:whole].reshape(-1, size)])
        groups = groups[np.argsort(mix(self._seed, epoch, 1, np.arange(len(groups))), kind="stable")]
        rest = left[whole:]
        self._borrowed = (size - len(rest)) % size if len(rest) else 0
        if len(rest):
            # A data set smaller than a group is repeated.
            more = np.resize(self._permutation(epoch + 1), self._borrowed)
            groups = np.concatenate([groups, np.concatenate([rest, more])[None]])
        self._epoch, self._groups = epoch, groups
