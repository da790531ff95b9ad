"""anidiff-jax: fine-tune AnimateDiff and sample from it, in JAX and Flax."""

__version__ = "0.1.0"


def __getattr__(name):  # the pipeline brings JAX with it: only when asked for
    if name == "AnimateDiffPipeline":
        from anidiff_jax.pipeline import AnimateDiffPipeline

        return AnimateDiffPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
