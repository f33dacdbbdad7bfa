"""TensorRT and TensorRT for RTX behind one code path; library.py alone knows that there are two, and in which versions.

library.py   the Python module, its version, the names that we use of it
device.py    the GPU, as its driver describes it
build.py     ONNX -> engine, on this GPU or ahead of time for others
monitor.py   what a builder tells while it builds, and how Ctrl-C stops it
kernels.py   what an engine computes in, read from the builder's log or the engine inspector
store.py     engines on disk: what each was made from and for, and refusing any other
cuda.py      arrays on the device, and the one stream on which everything happens to them
loaded.py    an engine on the device: buffers, queueing, CUDA graphs
run.py       a TensorRT engine as the rest of the package sees engines
"""
