"""Run a command with every socket refused, for machines where `unshare -n` is not allowed.

Python programs started below inherit the guard through sitecustomize.
"""

import os
import subprocess
import sys
import tempfile

GUARD = """
import socket
def _refuse(*args, **kwargs):
    raise OSError("the network is blocked in this run")
socket.socket.connect = _refuse
socket.socket.bind = _refuse
socket.create_connection = _refuse
"""

with tempfile.TemporaryDirectory() as folder:
    with open(os.path.join(folder, "sitecustomize.py"), "w", encoding="utf-8") as file:
        file.write(GUARD)
    environment = {**os.environ, "PYTHONPATH": folder}
    sys.exit(subprocess.run(sys.argv[1:], env=environment).returncode)
