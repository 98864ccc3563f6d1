# Serves a bundle, on a CPU:
#   docker build -t flashdiff .
#   docker run -p 127.0.0.1:50051:50051 -v $PWD/bundle:/bundle:ro flashdiff
# With HTTP, and the page at http://127.0.0.1:8000:
#   docker run -p 127.0.0.1:50051:50051 -p 127.0.0.1:8000:8000 -v $PWD/bundle:/bundle:ro flashdiff \
#     serve /bundle --host 0.0.0.0 --no-auth --http-port 8000
# On an NVIDIA GPU (never tried). TensorRT's libraries come from NVIDIA's index; EXTRAS=http,tensorrt-rtx needs none but the public one.
#   docker build -t flashdiff --build-arg BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04 --build-arg EXTRAS=http,tensorrt \
#     --build-arg PIP_EXTRA_INDEX_URL=https://pypi.nvidia.com .
#   docker run --gpus all -p 127.0.0.1:50051:50051 -v $PWD/bundle:/bundle:ro flashdiff
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=http,cpu
ARG PIP_EXTRA_INDEX_URL

# The CUDA base has no Python of its own.
RUN command -v python3 >/dev/null || (apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)
RUN python3 -m venv /opt/flashdiff || (apt-get update && apt-get install -y --no-install-recommends python3-venv \
    && rm -rf /var/lib/apt/lists/* && python3 -m venv /opt/flashdiff)
ENV PATH=/opt/flashdiff/bin:$PATH

WORKDIR /src
COPY . .
# The usual extras are installed by hash; of others the versions are pinned.
RUN if [ "$EXTRAS" = http,cpu ]; then pip install --no-cache-dir --require-hashes -r requirements.lock && pip install --no-cache-dir --no-deps .; \
    else pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]"; fi && rm -rf /src/*

RUN useradd --create-home flashdiff
USER flashdiff
WORKDIR /home/flashdiff
EXPOSE 50051 8000
STOPSIGNAL SIGTERM
ENTRYPOINT ["flashdiff"]
# Reached through the port that `docker run -p` publishes; for more than one machine add --tokens and TLS in place of --no-auth.
CMD ["serve", "/bundle", "--host", "0.0.0.0", "--no-auth"]
