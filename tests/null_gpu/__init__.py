"""A GPU that computes nothing: programs for a GPU run from end to end without one, and all their values are wrong.

``python -m tests.null_gpu -m benchmarks.kernels --rounds 1 --tokens 512``, with a PyTorch built for CUDA and the
headers of Triton, where there is no GPU. What is true there: which device a tensor is on, shapes and dtypes, what is
allocated, what a call costs the host, what is compiled, and every line of Python that runs. Times on the device are
drawn by lot, and a number that is fetched from it is 1.

Two libraries come before NVIDIA's: ``runtime.c`` for the CUDA runtime and cuBLAS, ``driver.c`` for the driver that
PyTorch and Triton look for. A function that these do not have returns 0.
"""
