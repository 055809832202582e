# syntax=docker/dockerfile:1
# What pods run. On CPUs as it is; for GPUs over NVIDIA's Triton, which brings CUDA, TensorRT and the tensorrt backend:
#
#   docker build -f k8s/images/serving.Dockerfile -t trireme/serving:0.1.0 .
#   docker build -f k8s/images/serving.Dockerfile -t trireme/serving-gpu:0.1.0 \
#       --build-arg BASE=nvcr.io/nvidia/tritonserver:26.10-py3 --build-arg EXTRAS=rtx .
#
# To pin harder than a tag: --build-arg BASE=name:tag@sha256:…
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS install
ARG EXTRAS=embedded
WORKDIR /source
COPY pyproject.toml constraints.txt ./
COPY k8s/images/install.sh k8s/images/install.sh
COPY runtime runtime
RUN k8s/images/install.sh serving /opt/trireme "${EXTRAS}"

FROM ${BASE}
COPY --from=install /opt/trireme /opt/trireme
ENV HOME=/tmp \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PATH=/opt/trireme/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# The root file system may be read-only: the server writes to /tmp, /repository and /dev/shm alone.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8080 8081 8003
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["/opt/trireme/bin/python", "-m", "runtime.pod", "probe"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/trireme/bin/python", "-m", "runtime.pod"]
