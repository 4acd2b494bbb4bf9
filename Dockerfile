# The server in a container, with CUDA or for CPUs alone:
#
#   docker build -t quickchange .                               # torch's wheel from the package index brings CUDA's libraries
#   docker build -t quickchange:cpu --build-arg VARIANT=cpu .   # a fifth of the size
#   docker run --gpus all --read-only --tmpfs /tmp --cap-drop ALL -p 127.0.0.1:50051:50051 -p 127.0.0.1:9464:9464 -v quickchange:/data quickchange
#
# Without arguments everybody who reaches the port may do everything, which is why it is published to this machine alone above.
# Arguments of your own replace CMD, and then say who may: `--base smollm2 --tokens /data/tokens.json`.
#
# The image was not built: no Docker was there. Its steps are deploy/install.sh, which a test runs into an empty folder, and then
# starts the server as a user without rights on a tree that cannot be written. Tags are pinned; digests could not be looked up.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE} AS build
ARG VARIANT=cuda
ARG EXTRAS=server,tracing
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# For the native kernels; the compiler stays behind in this stage.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
ENV PIP_NO_CACHE_DIR=1
WORKDIR /src
COPY constraints.txt ./
COPY deploy/install.sh deploy/
# The large layer, which changes only with its pin.
RUN deploy/install.sh /opt/quickchange torch
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE ./
COPY quickchange quickchange
COPY server server
COPY adapters adapters
COPY training training
COPY kernels kernels
RUN deploy/install.sh /opt/quickchange quickchange

# hadolint ignore=DL3006
FROM ${PYTHON_IMAGE}
RUN useradd --system --uid 10001 --no-create-home --home-dir /data --shell /usr/sbin/nologin quickchange \
 && install --directory --owner quickchange --mode 0700 /data
COPY --from=build /opt/quickchange /opt/quickchange
# All that is written lies under /data, and what is temporary under /tmp: the rest may be read-only.
ENV PATH=/opt/quickchange/bin:$PATH HOME=/data QUICKCHANGE_CACHE=/data/cache HF_HOME=/data/huggingface \
    HF_HUB_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 50051 9464
# The first start fetches and quantises a base, which may take minutes. With TLS: docs/guides/security.md, "Probes".
HEALTHCHECK --interval=15s --timeout=10s --start-period=10m --retries=3 \
    CMD ["quickchange", "health", "--timeout", "5"]
ENTRYPOINT ["quickchange", "serve", "--store", "/data/store", "--host", "0.0.0.0", "--metrics-host", "0.0.0.0"]
CMD ["--base", "smollm2", "--insecure-open", "on"]
