import jax

# Programs are compiled quickly rather than well. An XLA that does not know a flag stops the process: from jax 0.11 on the second is gone.
QUICKLY = "--xla_backend_optimization_level=0" + (" --xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else "")
