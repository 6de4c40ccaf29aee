# docker build -t topt-run .                              prediction on a CPU: no PyTorch
# docker build -t topt-run-gpu --target runtime-gpu .     prediction on an NVIDIA GPU: no PyTorch; run it with --gpus all
#   ... --build-arg WITH_TENSORRT=1                       and TensorRT, which is fetched from NVIDIA's own index
# docker build -t topt-deploy --target train .            training and export: PyPI's PyTorch, made for CUDA
#   ... --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu     the same, gigabytes smaller, CPU only
# What RUN does lies in scripts/, where `make check-install` runs the same lines without Docker.

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY . .
RUN sh scripts/build-wheel.sh dist

FROM python:3.11-slim AS base
LABEL org.opencontainers.image.title="topt-deploy" org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Counts per urban region from task-oriented prompt tuning (ToPT)"
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /opt/topt
COPY constraints.txt ./
COPY scripts/install-runtime-cpu.sh scripts/install-runtime-gpu.sh scripts/install-train.sh scripts/remove-unused.sh scripts/
COPY --from=wheel /src/dist dist/
# A volume that Docker creates at /data takes its owner from here.
RUN install -d -o 10001 -g 10001 /data

FROM base AS train
ARG PIP_EXTRA_INDEX_URL
RUN sh scripts/install-train.sh dist
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["topt-deploy"]

# CUDA and cuDNN are Python packages, pinned like all others, on the base that all targets share: nvidia/cuda's images
# hold a second copy of what pip resolves, and could not be checked without Docker. topt-run loads them from where pip
# put them; the driver is the host's.
FROM base AS runtime-gpu
ARG WITH_TENSORRT=0
RUN WITH_TENSORRT=$WITH_TENSORRT sh scripts/install-runtime-gpu.sh dist
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["topt-run"]

# The numeric user satisfies Kubernetes' runAsNonRoot; to write into a mounted folder of yours, add
# --user "$(id -u):$(id -g)".
FROM base AS runtime-cpu
RUN sh scripts/install-runtime-cpu.sh dist
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["topt-run"]

# The name of before there was another one; last, so that it is what a plain `docker build` makes.
FROM runtime-cpu AS runtime
