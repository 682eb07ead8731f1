"""What PyTorch reads from the environment when it loads."""

import os

SETTINGS = {
    # threads that wait for the next loop spin for some 20 µs: for longer, as OpenMP's do by themselves, and a busy
    # machine runs small models many times slower; not at all, and an idle one is a fifth slower
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "2000",
    # products that oneDNN keeps ready: with 1024, its own number, it holds 0.1 GiB more and nothing is faster
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def prepare_environment() -> None:
    """Before torch is imported; what somebody has set stays."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
