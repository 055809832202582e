# syntax=docker/dockerfile:1
# What the engine-build Job runs. Engines of the flavour tensorrt-rtx need no GPU; those of the flavour tensorrt are
# built over NVIDIA's image of the very release that will serve them:
#
#   docker build -f k8s/images/builder.Dockerfile -t trireme/builder:0.1.0 .
#   docker build -f k8s/images/builder.Dockerfile -t trireme/builder-gpu:0.1.0 \
#       --build-arg BASE=nvcr.io/nvidia/tensorrt:26.10-py3 .
#
# PyPI's torch carries CUDA; PIP_EXTRA_INDEX_URL may name an index with a CPU build.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS install
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /source
COPY pyproject.toml constraints.txt ./
COPY k8s k8s
COPY builders builders
COPY cluster cluster
COPY loadtest loadtest
COPY model_repository model_repository
COPY runtime runtime
RUN PIP_EXTRA_INDEX_URL="${PIP_EXTRA_INDEX_URL}" k8s/images/install.sh builder /opt/trireme

FROM ${BASE}
COPY --from=install /opt/trireme /opt/trireme
ENV HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/trireme/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
# A Job ends by itself; nothing asks for its health.
HEALTHCHECK NONE
ENTRYPOINT ["/opt/trireme/bin/trireme"]
