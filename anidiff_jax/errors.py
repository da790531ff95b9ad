"""Mistakes of the user, as opposed to ours."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Runs a script: a user's mistake ends it with one line and exit code 2, an interruption with 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
