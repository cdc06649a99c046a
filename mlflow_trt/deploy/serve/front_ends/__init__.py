"""Processes that speak HTTP for a server: they read requests and write answers, and know nothing of models.

    clients -- HTTP --> front end -- shared memory --> the server: limits, keys, models, statistics, the GPU

A front end sends the head of a request over a socket, and puts its body into memory that both processes map, from which
the server copies its rows to the GPU; answers come back the same way. The server answers as if it had read the request
itself: to its ASGI application a front end is a connection like any other.
"""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""For the server, which lets its front ends end when they have answered: they themselves ignore them."""
