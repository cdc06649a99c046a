"""A model as objects of Kubernetes, of its own kinds or of KServe's."""
