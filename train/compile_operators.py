"""Compile, once, the C++ operator that DeepSpeed's CPU communication loads, so that the first training run need not.

python -m train.compile_operators
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys


def main() -> int:
    import torch

    if torch.cuda.is_available():
        return 0  # NCCL is used there
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.disable(logging.WARNING)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        from deepspeed.comm.torch import build_shm_op

        operator = build_shm_op()
    if operator is None:
        print("DeepSpeed has no shared-memory operator for this machine; gloo alone will be used", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
