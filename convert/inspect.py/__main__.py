"""`python convert/inspect.py FILE_OR_FOLDER …`: convert/inspect_weights.py by its short name.

A folder and no file, because a file of this name would take the place of Python's own module `inspect` in every script beside it.
"""

import runpy
from pathlib import Path

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent.parent / "inspect_weights.py"), run_name="__main__")
