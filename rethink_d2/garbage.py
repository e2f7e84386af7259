"""Python's garbage collector, out of the way of work on millions of objects."""

import contextlib
import gc

__all__ = ["without_garbage_collection"]


@contextlib.contextmanager
def without_garbage_collection():
    """While active, objects that refer to each other are not looked for; also a decorator.

    Every so many new objects the collector looks through all of the process's, and where annotations or
    predictions are read none of them is garbage.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
