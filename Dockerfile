# The daemon and its trainer on a RunPod GPU pod. Ordered by how often things change: libraries, then code.
ARG BASE=runpod/pytorch:1.0.3-cu1281-torch291-ubuntu2404
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
WORKDIR /opt/brightrun

# The base image's torch was built for its CUDA and stays: the environment sees the image's packages, and pip is
# held to the very torch that it finds there. Everything else is pinned by constraints.txt.
COPY constraints.txt pyproject.toml README.md ./
RUN python3 -m venv --system-site-packages /opt/venv \
    && python3 -c 'import torch; print(f"torch=={torch.__version__}")' > torch.txt \
    && grep -v '^torch==' constraints.txt > image-constraints.txt \
    && cat torch.txt >> image-constraints.txt \
    && mkdir -p daemon/demo training sql/migrations sql/queries sql/local \
    && /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check \
       -c image-constraints.txt . supervisor \
    && /opt/venv/bin/python -m pip uninstall --yes --disable-pip-version-check brightrun-trainer \
    && rm -rf build ./*.egg-info

# The code: seconds, since nothing above depends on it.
COPY daemon ./daemon
COPY training ./training
COPY sql ./sql
COPY supervisord.conf ./
RUN /opt/venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check --no-deps . \
    && rm -rf build ./*.egg-info \
    && useradd --create-home --uid 10001 trainer \
    && mkdir -p /workspace /run/brightrun \
    && chown trainer:trainer /workspace /run/brightrun

LABEL org.opencontainers.image.title="brightrun-trainer" \
      org.opencontainers.image.description="Insert a row. Get an adapter. Fine-tuning from a Postgres table." \
      org.opencontainers.image.version="0.1.0"

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/workspace/huggingface \
    TRAINER_PYTHON=/opt/venv/bin/python \
    SUPERVISOR_RUN_DIR=/run/brightrun

# Not root. Where a network volume was written by root before, give the folder away once
# (chown -R 10001 /workspace) or set the pod template's user to root.
USER 10001

# Alive means that supervisord has the daemon running; `doctor` looks deeper.
HEALTHCHECK --interval=30s --timeout=10s --start-period=30s --retries=3 \
    CMD ["supervisorctl", "-c", "/opt/brightrun/supervisord.conf", "status", "trainer"]

# The base image's own start script writes the environment, secrets included, to a readable file and sleeps for ever.
ENTRYPOINT []
CMD ["supervisord", "-n", "-c", "/opt/brightrun/supervisord.conf"]
