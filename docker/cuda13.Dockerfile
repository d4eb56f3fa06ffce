# oryx_megatron on a CUDA 13 image of Docker Hub, as docs/install-gpu.md installs it:
#   docker build --file docker/cuda13.Dockerfile --tag oryx .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume "$PWD:/work" oryx doctor
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git ninja-build python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3.12 -m venv /opt/oryx
ENV PATH=/opt/oryx/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 MAX_JOBS=8
WORKDIR /opt/source
COPY configs/install/cuda13.txt configs/install/
RUN pip install --constraint configs/install/cuda13.txt torch setuptools wheel ninja packaging
# Packages that compile against torch see it: no build isolation. mamba-ssm asks for tilelang 0.1.8, for kernels that are
# not used here: no dependencies of it. The longest step, and the same for every source.
# A layer of its own: torch's, before it, is kept when this one changes.
# hadolint ignore=DL3059
RUN pip install --constraint configs/install/cuda13.txt --no-build-isolation "transformer-engine[pytorch]" causal-conv1d \
        flash-linear-attention tilelang flash-qla flash-attn-4 \
    && pip install --constraint configs/install/cuda13.txt --no-build-isolation --no-deps mamba-ssm
COPY . .
RUN pip install --constraint configs/install/cuda13.txt ".[plots,tensorboard,data]" && oryx --version
WORKDIR /work
USER 1000:1000
ENV HOME=/tmp
ENTRYPOINT ["oryx"]
CMD ["--help"]
