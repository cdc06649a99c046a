"""Source and recipe in, finished model out: convert, verify, choose the best. Knows nothing of MLflow's stores."""
