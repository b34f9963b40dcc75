# A CLO server on an NVIDIA GPU. The host needs a driver for CUDA 13 (580 or newer) and the NVIDIA Container Toolkit;
# CUDA itself comes with the Python packages.
#
#   docker build -t clo .
#   docker run --gpus all --ulimit memlock=-1 --cap-add SYS_NICE -p 127.0.0.1:5555:5555 -p 127.0.0.1:8000:8000 \
#       -v clo-cache:/home/clo/.cache clo --model Qwen/Qwen3-8B --http 8000
#
# memlock: the KV cache is pinned for the GPU. SYS_NICE: Docker then lets a process bind its memory to a NUMA node; without
# it CLO logs a warning and goes on. --ipc and --shm-size are not needed: the KV cache is a memfd, outside /dev/shm.
# Without CLO_API_KEY whoever reaches a port can use it: publish them on 127.0.0.1, as above, and not on every address.

FROM python:3.12-slim-bookworm AS wheel
COPY . /src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim-bookworm

# Triton, which torch.compile uses, compiles a little C when the server starts. KubeRay, but for its latest versions,
# asks by wget whether a node of Ray lives.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/*

# the versions that have been measured on a GPU, in a layer of their own since they are large and change rarely
RUN pip install --no-cache-dir torch==2.11.0 transformers==5.17.0 "cupy-cuda13x[ctk]==14.2.0"

# ray besides is for replicas over machines (docs/ray.md)
ARG EXTRAS=cuda,http,structured,otel,encryption
COPY --from=wheel /wheels /wheels
RUN pip install --no-cache-dir "$(echo /wheels/*.whl)[${EXTRAS}]"

# The cache belongs to the user, so that a volume mounted there does too.
RUN useradd --create-home clo && install -d -o clo -g clo /home/clo/.cache
USER clo
WORKDIR /home/clo

EXPOSE 5555 8000
# all addresses of the container; which ones of the host lead here is for -p to say
ENTRYPOINT ["clo", "serve", "--host", "0.0.0.0"]
