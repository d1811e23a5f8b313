"""Tests of Triton kernels: by themselves on a GPU, in Triton's interpreter elsewhere.

Import after `pytest.importorskip("triton")`, in a file that calls `run` in one test marked `alone` and marks the others
`runs`.
"""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

IS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if IS_GPU else "cpu"
INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
runs = pytest.mark.gpu if IS_GPU else pytest.mark.skipif(not INTERPRETS, reason="runs inside test_in_the_interpreter")


def alone(test):
    """Marks the test that runs the others of its file in the interpreter."""
    for unfit, reason in (
        (
            np.lib.NumpyVersion(np.__version__) >= "2.4.0",
            "Triton 3.6's interpreter takes arrays of one element for ints, which numpy 2.4 refuses",
        ),
        (IS_GPU or INTERPRETS, "the other tests run by themselves here"),
    ):
        test = pytest.mark.skipif(unfit, reason=reason)(test)
    return test


def run(path: str) -> None:
    """Runs a test file in the interpreter, in a process of its own: Triton reads the variable when it is first
    imported, and other test files have imported it by now."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    ran = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
