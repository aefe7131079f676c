"""``python -m midstream_testbed clean``: take away what crashed runs left; a living owner's testbed stays."""

from __future__ import annotations

import argparse

from midstream_testbed import state


def main() -> None:
    parser = argparse.ArgumentParser(prog="midstream_testbed", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    clean = commands.add_parser("clean", help="remove testbeds whose owner is gone")
    clean.add_argument("prefix", nargs="*", help="only these; every orphaned one by default")
    wanted = parser.parse_args().prefix
    for prefix in state.leftovers():
        if not wanted or prefix in wanted:
            state.sweep(prefix)
            print(f"removed {prefix}")


if __name__ == "__main__":
    main()
