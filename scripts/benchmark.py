#!/usr/bin/env python
"""Speed against stock Detectron2: see ``scripts/benchmark.py --help`` and docs/benchmarks.md."""

import sys

from rethink_d2.benchmarks.__main__ import cli

if __name__ == "__main__":
    sys.exit(cli())
