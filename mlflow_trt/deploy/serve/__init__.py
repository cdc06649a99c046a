"""A server of our own: the Open Inference Protocol over HTTP, and MLflow's `/invocations` beside it."""
