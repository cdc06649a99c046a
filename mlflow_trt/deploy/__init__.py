"""Models of this flavor in other servers: Triton, containers, Spark."""
