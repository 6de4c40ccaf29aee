#!/bin/sh
# install-runtime-gpu.sh DIR: the same for an NVIDIA GPU: onnxruntime-gpu, and CUDA 13 and cuDNN 9 as Python packages.
# WITH_TENSORRT=1 adds TensorRT, whose package downloads its libraries from NVIDIA's own index while it installs.
set -eu
extras=gpu,encoder
[ "${WITH_TENSORRT:-0}" = 0 ] || extras=$extras,trt
python3 -m pip install --quiet --constraint constraints.txt \
    "$(ls "$1"/topt_deploy-*.whl)[$extras]" "onnxruntime-gpu[cuda,cudnn]"
