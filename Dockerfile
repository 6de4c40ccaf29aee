# docker build -t topt-run .                           prediction: no PyTorch
# docker build -t topt-deploy --target train .         training and export: PyPI's PyTorch, made for CUDA
#   ... --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu     the same, gigabytes smaller, CPU only
# What RUN does lies in scripts/, where `make check-install` runs the same lines without Docker.

FROM python:3.11-slim AS wheel
WORKDIR /src
COPY . .
RUN sh scripts/build-wheel.sh dist

FROM python:3.11-slim AS base
ENV PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /opt/topt
COPY constraints.txt ./
COPY scripts/install-runtime.sh scripts/install-train.sh scripts/
COPY --from=wheel /src/dist dist/
# A volume that Docker creates at /data takes its owner from here.
RUN install -d -o 10001 -g 10001 /data

FROM base AS train
ARG PIP_EXTRA_INDEX_URL
RUN sh scripts/install-train.sh dist
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["topt-deploy"]

# Last, so that it is what a plain `docker build` makes. The numeric user satisfies Kubernetes' runAsNonRoot;
# to write into a mounted folder of yours, add --user "$(id -u):$(id -g)".
FROM base AS runtime
RUN sh scripts/install-runtime.sh dist
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["topt-run"]
