# The daemon and its trainer on a RunPod GPU pod. Ordered by how often things change: libraries, then code.
ARG BASE=runpod/pytorch:1.4.0-cu1300-torch2130-ubuntu2404
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/brightrun

# Not root. `doctor` says so where a network volume was written by root before.
RUN useradd --create-home --uid 10001 trainer \
    && mkdir -p /workspace /run/brightrun \
    && chown trainer:trainer /workspace /run/brightrun

# What only the image needs: its init, the kernels of Qwen3-Next's linear attention (Triton, no compiler at build),
# and what the code's own layer is built with. Names only: every version stands in constraints.txt.
ARG IMAGE_PACKAGES="supervisor flash-linear-attention setuptools"
# The fused convolution that goes with them: a wheel for this very torch, CUDA and Python, by its URL (see the guide).
ARG CAUSAL_CONV1D=""

# Empty keeps the base's torch, which must be the floor of pyproject.toml or newer: pip refuses an older one. Another is
# named with its CUDA. PyTorch publishes 2.13.0 for CUDA 13.0, which needs driver 580, and for CUDA 12.6 ("2.13.0+cu126"
# on a base of CUDA 12: driver 525 and newer, no Blackwell), and none for 12.8.
ARG TORCH=""

# Where no other is named the base's torch stays: the environment sees the image's packages, and pip is held to the
# very torch that it finds there, and to the Triton that torch brings. Everything else is pinned by constraints.txt.
COPY constraints.txt pyproject.toml ./
RUN python3 -m venv --system-site-packages /opt/venv \
    && grep -Ev '^(torch|triton)==' constraints.txt > image-constraints.txt \
    && if [ -n "${TORCH}" ]; then \
         /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c image-constraints.txt \
         --extra-index-url "https://download.pytorch.org/whl/${TORCH##*+}" "torch==${TORCH}"; \
       fi \
    && /opt/venv/bin/python -c 'import torch; print(f"torch=={torch.__version__}")' >> image-constraints.txt \
    && mkdir -p daemon training sql && touch README.md \
    # shellcheck disable=SC2086
    && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
       -c image-constraints.txt ".[gguf]" ${IMAGE_PACKAGES} ${CAUSAL_CONV1D} \
    && /opt/venv/bin/python -m pip uninstall --yes --disable-pip-version-check brightrun-trainer \
    && rm -rf build ./*.egg-info

# The code: seconds, and no network, since nothing above depends on it.
COPY README.md supervisord.conf ./
COPY daemon ./daemon
COPY training ./training
COPY sql ./sql
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps --no-build-isolation . \
    && rm -rf build ./*.egg-info

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="brightrun-trainer" \
      org.opencontainers.image.description="Insert a row. Get an adapter. Fine-tuning from a Postgres table." \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/workspace/huggingface \
    TRAINER_PYTHON=/opt/venv/bin/python \
    SUPERVISOR_RUN_DIR=/run/brightrun \
    SERVE_GATEWAY=false

# Where root wrote to the volume before, give the folder away once (chown -R 10001 /workspace), or set the pod
# template's user to root.
USER 10001

# Alive means that supervisord has the daemon running; `doctor` looks deeper.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["supervisorctl", "-c", "/opt/brightrun/supervisord.conf", "status", "trainer"]

# The base image's own start script writes the environment, secrets included, to a readable file and sleeps for ever.
ENTRYPOINT []
CMD ["bash", "/opt/brightrun/daemon/pod/container.sh"]
