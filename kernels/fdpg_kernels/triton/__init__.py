"""The ops as Triton kernels. Only `launch` is called from outside; nothing here is imported where Triton is absent."""
