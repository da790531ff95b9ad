"""What arguments become that are not given: with the embedded model, and by the recipes that have names."""

from typing import Any

# What an argument that is not given becomes when no model is given either, and the embedded one is taken.
EMBEDDED_DEFAULTS: dict[str, Any] = {
    "sample_size": "64",
    "sample_stride": 2,
    "sample_n_frames": 8,
    "guidance_scale": 5.0,
    "context_frames": 8,
    "num_train_epochs": 20,
}
# The recipes that --preset names. What the user gives wins.
PRESETS: dict[str, dict[str, Any]] = {
    "official": {
        "scheduler": "ddim",
        "num_inference_steps": 25,
        "guidance_scale": 8.0,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": True,
    },
    "diffusers": {
        "scheduler": "ddim",
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "linear",
        "timestep_spacing": "linspace",
        "steps_offset": 1,
        "clip_sample": False,
        "set_alpha_to_one": False,
    },
    "lcm": {"scheduler": "lcm", "num_inference_steps": 6, "guidance_scale": 1.5, "beta_schedule": "linear", "clip_sample": False},
    "lightning": {
        "scheduler": "euler",
        "num_inference_steps": 4,
        "guidance_scale": 1.0,
        "beta_schedule": "linear",
        "timestep_spacing": "trailing",
        "clip_sample": False,
    },
}
