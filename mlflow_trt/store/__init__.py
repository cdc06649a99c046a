"""The model folder on disk, the caches, and loading what fits this machine. Knows nothing of MLflow's stores."""
