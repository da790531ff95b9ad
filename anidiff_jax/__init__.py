"""anidiff-jax: fine-tune AnimateDiff and sample from it, in JAX and Flax."""

import os

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is missing: what is used of it needs none

__version__ = "0.1.0"


def __getattr__(name):  # the pipeline brings JAX with it: only when asked for
    if name == "AnimateDiffPipeline":
        from anidiff_jax.pipeline import AnimateDiffPipeline

        return AnimateDiffPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
