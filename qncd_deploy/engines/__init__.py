"""Inference engines behind one protocol: named arrays in, named arrays out, NumPy's or, on a GPU, its own.

base.py opens one by its backend's name; each backend is one file, the only one that imports its library:

    openvino.py     CPU default: runs the master graph as it is, compiled for the batch at hand
    ort.py          ONNX Runtime on the CPU: runs the sibling written for its fusions
    ort_gpu.py      ONNX Runtime on a GPU, through its TensorRT, TensorRT for RTX and CUDA providers
    torch_ref.py    the yardstick: the graph's operators one by one in torch, no fusion, no rewriting
    trt/            NVIDIA GPUs: TensorRT and TensorRT for RTX

stored.py keeps what is compiled on disk, whatever compiled it. eps_model.py adapts an engine to the sampling loop.
Nothing else here knows what diffusion is.
"""
