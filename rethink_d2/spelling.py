"""What was probably meant by a name that does not exist."""

import difflib

__all__ = ["nearest"]


def nearest(name, names):
    """Suggest what was probably meant.

    Args:
        name (str): a name that does not exist.
        names (Collection[str]): those that do.

    Returns:
        str: "; did you mean ...?", or "" when nothing is close.
    """
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
    if not close:
        # A right last part under a wrong path (SOLVER.FREEZE_AT) is as telling as a close spelling.
        last = name.rsplit(".", 1)[-1]
        close = [n for n in names if n.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean {close[0]}?" if close else ""
