#!/usr/bin/env python
"""Train or evaluate one experiment; see README.md. The same as ``python -m rethink_d2.train``."""

import sys

from rethink_d2.train import cli

if __name__ == "__main__":
    sys.exit(cli())
