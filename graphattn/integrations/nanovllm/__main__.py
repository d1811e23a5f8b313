"""Runs a script of nano-vLLM on graphattn.

python -m graphattn.integrations.nanovllm your_script.py [its arguments]
"""

from __future__ import annotations

import sys
from pathlib import Path

from graphattn.integrations.nanovllm import install

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("python -m graphattn.integrations.nanovllm your_script.py [its arguments]: name a script")
    install()
    del sys.argv[0]
    path = Path(sys.argv[0])
    sys.path.insert(0, str(path.parent.resolve()))
    # In this very module: one of its own would have the processes of tensor parallelism import the script anew, before
    # anything is installed in them.
    globals()["__file__"] = str(path)
    exec(compile(path.read_bytes(), str(path), "exec"), globals())
