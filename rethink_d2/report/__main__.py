"""``python -m rethink_d2.report OUT``: a page with the paper's figures and tables from your own runs.

It reads the run folders below OUT, finished or not, and writes OUT/report/index.html.
"""

import argparse
import sys

from .page import write_report
from .serve import serve, watch

REFUSED = 2


def argument_parser():
    """The command line's arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m rethink_d2.report", description=__doc__.replace("``", "")
    )
    parser.add_argument("out", metavar="OUT", help="folder of the run folders, such as output")
    parser.add_argument("--watch", action="store_true", help="make it anew while runs go on, until Ctrl-C")
    parser.add_argument("--serve", action="store_true", help="the same, and serve it to browsers")
    parser.add_argument("--port", metavar="N", type=int, default=8000, help="to serve at (%(default)s)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at (%(default)s: this machine only)"
    )
    return parser


def cli(argv=None):
    """The command line.

    Returns:
        int: 0; 2 where there is no run, or the address cannot be had.
    """
    args = argument_parser().parse_args(argv)
    try:
        if args.serve:
            serve(args.out, args.host, args.port)
        elif args.watch:
            watch(args.out)
        else:
            print(write_report(args.out))
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        pass
    return 0


if __name__ == "__main__":
    sys.exit(cli())
