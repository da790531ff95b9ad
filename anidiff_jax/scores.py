"""Scores of a video that need no labels and no network. Videos are (frames, h, w, 3) in [0, 1].

A frozen video has the best flicker score there is: read it beside the motion degree, never alone.
"""

from collections.abc import Mapping

import numpy as np


def temporal_flicker(video) -> float:
    """1 - mean absolute difference of neighbouring frames, as VBench's temporal flickering (arXiv:2311.17982); 1 = nothing changes."""
    return float(1 - _changes(video).mean()) if len(video) > 1 else 1.0


def motion_degree(video) -> float:
    """Mean of the 5 % of pixels that change most from frame to frame, in [0, 1]; 0 = frozen.

    VBench's dynamic degree takes the largest 5 % of the optical flow; differences in its place need no flow network.
    """
    if len(video) < 2:
        return 0.0
    changes = np.sort(_changes(video).mean(-1).reshape(len(video) - 1, -1), axis=1)
    return float(changes[:, -max(1, changes.shape[1] // 20) :].mean())


def general_scores(video) -> Mapping[str, float]:
    """Both, rounded."""
    return {"temporal_flicker": round(temporal_flicker(video), 4), "motion_degree": round(motion_degree(video), 4)}


def _changes(video):
    return np.abs(np.diff(np.asarray(video, np.float32), axis=0))
