"""Print a TCP port of 127.0.0.1 that nothing listens on: the one named, else a platform's own.

Usage: free_port.py PORT PLATFORM. With PORT 0 only a port of its own will do, so that platforms
which start at the same moment try different ones.
"""

from __future__ import annotations

import hashlib
import socket
import sys

wanted = int(sys.argv[1])
own = 20000 + int(hashlib.sha256(sys.argv[2].encode()).hexdigest(), 16) % 10000
for port in [wanted] * bool(wanted) + list(range(own, own + 1000)):
    with socket.socket() as candidate:
        try:
            candidate.bind(("127.0.0.1", port))
            candidate.listen()
        except OSError:
            continue
    print(port)
    break
