EMBEDDED_DEFAULTS = {"sample_size": 64, "sample_stride": 1, "guidance_scale": 5.0}
