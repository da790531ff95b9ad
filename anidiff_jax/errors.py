"""Mistakes of the user, as opposed to ours."""

import atexit
import contextlib
import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend. The message is one line: what is wrong, where, and what to do."""


def read_text(path: Path) -> str:
    """A text file of the user's."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not text in UTF-8: save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


@contextlib.contextmanager
def memory_told() -> Iterator[None]:
    """What a device or the machine has too little memory for becomes a UserError: one line, instead of a page of XLA's."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = (str(error).strip() or "MemoryError").splitlines()[0][:200]
        raise UserError(
            f"out of memory ({said}): smaller are --sample_size, --sample_n_frames or --context_frames; in training --batch_size 1, "
            "--gradient_checkpointing true and --latent_cache DIR"
        ) from None


def run_script(main: Callable[[], None]) -> None:
    """Runs a script: a user's mistake ends it with one line and exit code 2, an interruption with 130."""
    # What JAX traces lives on: to look through all of it again and again takes half a second of a start, and as much at the end.
    gc.set_threshold(5_000, 20, 20)
    atexit.register(gc.freeze)
    try:
        with memory_told():
            main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
