# Serves a bundle, on a CPU:
#   docker build -t flashdiff .
#   docker run -p 127.0.0.1:50051:50051 -v $PWD/bundle:/bundle:ro flashdiff
# With HTTP, and the page at http://127.0.0.1:8000:
#   docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:8000:8000 -e FLASHDIFF_HTTP_PORT=8000 -v $PWD/bundle:/bundle:ro flashdiff
# On an NVIDIA GPU (never tried): EXTRAS=http,distill for torch's bundles, the default there, and http,tensorrt-rtx need the public
# index alone; TensorRT's libraries come from NVIDIA's.
#   docker build -t flashdiff:latest-cuda --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg EXTRAS=http,tensorrt \
#     --build-arg PIP_EXTRA_INDEX_URL=https://pypi.nvidia.com .
#   docker run --gpus all -p 127.0.0.1:50051:50051 -v $PWD/bundle:/bundle:ro flashdiff:latest-cuda
ARG BASE=python:3.11-slim

# --- what both stages have: a Python, which the CUDA base lacks ---
FROM ${BASE} AS base
RUN command -v python3 >/dev/null || (apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)

# --- the environment, built where pip and the sources may be ---
FROM base AS build
ARG EXTRAS=http,cpu
ARG PIP_EXTRA_INDEX_URL
# 1: with OpenTelemetry's SDK and exporter, for `opentelemetry-instrument`.
ARG TRACES=
RUN python3 -m venv /opt/flashdiff || (apt-get update && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/flashdiff)
ENV PATH=/opt/flashdiff/bin:$PATH
WORKDIR /src
COPY . .
# The usual extras are installed by hash; of others the versions are pinned.
RUN if [ "$EXTRAS" = http,cpu ]; then pip install --no-cache-dir --require-hashes -r requirements.lock && pip install --no-cache-dir --no-deps .; \
    else pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"; fi
RUN if [ -n "$TRACES" ]; then pip install --no-cache-dir -c constraints.txt opentelemetry-distro opentelemetry-exporter-otlp-proto-http; fi
# Not needed to run.
RUN pip uninstall -y -q pip

# --- what runs: that environment, and no sources, no pip, no root ---
FROM base
COPY --from=build /opt/flashdiff /opt/flashdiff
ENV PATH=/opt/flashdiff/bin:$PATH PYTHONDONTWRITEBYTECODE=1 XDG_CACHE_HOME=/tmp
RUN useradd --uid 10001 --user-group --no-create-home flashdiff
# By number, so that Kubernetes sees that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 50051 8000 9090
STOPSIGNAL SIGTERM
# Reached through the port that `docker run -p` publishes; for more than one machine set FLASHDIFF_TOKENS and TLS, and NO_AUTH=false.
ENV FLASHDIFF_HOST=0.0.0.0 FLASHDIFF_NO_AUTH=true FLASHDIFF_BUNDLES=/bundle
ENTRYPOINT ["flashdiff"]
CMD ["serve"]
