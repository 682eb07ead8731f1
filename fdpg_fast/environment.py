"""What PyTorch reads from the environment when it loads."""

import os

SETTINGS = {
    # threads that wait for the next loop spin for some 20 µs: for longer, as OpenMP's do by themselves, and a busy
    # machine runs small models many times slower; not at all, and an idle one is a fifth slower
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "2000",
    # oneDNN keeps the code of this many products; 1024 by itself, which is 0.25 GiB, while every micro-batch has new
    # shapes and uses about a dozen
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def prepare_environment() -> None:
    """Before torch is imported; what somebody has set stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
