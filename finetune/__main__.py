"""`finetune` and `python -m finetune`: the command line, which may be interrupted even while it is being imported."""

import importlib
import sys


def main() -> None:
    """See `finetune.cli.main`."""
    try:
        cli = importlib.import_module("finetune.cli")
    except KeyboardInterrupt:
        sys.stderr.write("Interrupted before anything began.\n")
        raise SystemExit(130) from None
    cli.main()


if __name__ == "__main__":
    main()
