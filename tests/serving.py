"""Servers on this machine that stand in for others."""

import contextlib
import threading


@contextlib.contextmanager
def serving(server):
    """The server, which answers while the block runs."""
    with server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
