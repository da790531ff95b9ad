"""A cluster that takes its machine back says so with SIGTERM, some seconds before: time to save."""

import logging
import signal

import jax

log = logging.getLogger(__name__)


class Stop:
    """Within `with`, SIGTERM no longer ends the process; `asked(step)` says that it came, in all processes at the same update."""

    def __enter__(self):
        self._came = False
        self._alone = jax.process_count() == 1  # else jax.distributed listens for it, and makes the processes agree
        if self._alone:
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *error):
        if self._alone:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_):
        self._came = True

    def asked(self, step: int) -> bool:
        if self._alone:
            return self._came
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)
