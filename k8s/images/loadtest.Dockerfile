# syntax=docker/dockerfile:1
# Locust, master or worker: docker build -f k8s/images/loadtest.Dockerfile -t trireme/loadtest:0.1.0 .
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS install
WORKDIR /source
COPY pyproject.toml constraints.txt ./
COPY k8s/images/install.sh k8s/images/install.sh
COPY loadtest loadtest
COPY runtime runtime
RUN k8s/images/install.sh loadtest /opt/trireme \
    && ln -s "$(/opt/trireme/bin/python -c 'import loadtest.drive as m; print(m.__path__[0])')/locustfile.py" /opt/trireme/locustfile.py

FROM ${BASE}
COPY --from=install /opt/trireme /opt/trireme
ENV HOME=/tmp \
    LOCUST_LOCUSTFILE=/opt/trireme/locustfile.py \
    PATH=/opt/trireme/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK NONE
ENTRYPOINT ["/opt/trireme/bin/locust"]
