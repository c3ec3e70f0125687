"""The `triton` backend: one kernel launch forward and one backward, for NVIDIA and AMD GPUs.

Importing a file of it needs Triton. With `TRITON_INTERPRET=1` set before the first import the same kernels run through
Triton's interpreter on tensors of any device, slowly, for tests.

All kernels only gather (an output element is written by one program, once), so there are no atomics and two runs give
the same bits. What a kernel is compiled for depends on the neighbourhood, the type, D, and for short sequences S, never
on the batch: nothing is tuned at run time.
"""
