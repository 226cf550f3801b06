"""Print the first TCP port of 127.0.0.1 that nothing listens on, from the one named upwards."""

from __future__ import annotations

import socket
import sys

for port in range(int(sys.argv[1]), 65536):
    with socket.socket() as candidate:
        candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            candidate.bind(("127.0.0.1", port))
        except OSError:
            continue
    print(port)
    break
