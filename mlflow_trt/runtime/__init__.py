"""Engine in, arrays out. Knows nothing of MLflow's stores and nothing of precision passes."""
