"""What studio.py is started with, checked once."""

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from anidiff_jax.errors import UserError

LORAS = 3  # that the page has room for


@dataclass(frozen=True)
class Settings:
    """models: folders whose weights may be chosen. runs: of training. output_path: where all that is made goes.

    auth: "user:password", demanded wherever others than this machine can reach the page. queue: jobs that may wait for the one that runs.
    max_…: limits of a job.
    """

    models: tuple[Path, ...] = ()
    runs: Path = Path("output")
    output_path: Path = Path("generated")
    host: str = "127.0.0.1"
    port: int | None = None
    auth: str | None = None
    queue: int = 16
    max_frames: int = 128
    max_side: int = 1024
    max_steps: int = 150
    max_videos: int = 16
    max_upload: str = "8gb"

    def __post_init__(self):
        for folder in self.models:
            if not folder.is_dir():
                raise UserError(f"models {folder} is no folder: give one that holds weights")
        for name in ("queue", "max_frames", "max_side", "max_steps", "max_videos"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        if not re.fullmatch(r"[1-9]\d*(kb|mb|gb)", self.max_upload):
            raise UserError(f"max_upload {self.max_upload} is not a size: write 500mb or 8gb")
        if self.auth is not None and not all(self.login or ("",)):
            raise UserError("auth must be user:password")
        if not self.private and self.auth is None:
            raise UserError(f"host {self.host} lets other machines reach the page: give --auth user:password as well")

    @property
    def private(self) -> bool:
        """Whether this machine alone can reach the page."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:  # a name
            return False

    @property
    def login(self) -> tuple[str, str] | None:
        if self.auth is None:
            return None
        user, _, password = self.auth.partition(":")
        return user, password

    @property
    def folders(self) -> tuple[Path, ...]:
        """Below which weights are looked for and read: those chosen, the runs, and what the page itself converted."""
        return (*self.models, self.runs, self.converted)

    @property
    def converted(self) -> Path:
        return self.output_path / "converted"
