# oryx_megatron on NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex stay as they are:
#   docker build --file docker/ngc.Dockerfile --tag oryx-ngc .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume "$PWD:/work" oryx-ngc doctor
FROM nvcr.io/nvidia/pytorch:26.02-py3
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/source
COPY configs/install/ngc.txt configs/install/
# The image's own constraints (PIP_CONSTRAINT) name other versions; what must stay of it becomes a constraint of its own.
RUN unset PIP_CONSTRAINT \
    && pip list --format=freeze | grep -iE '^(torch|triton|pytorch-triton|transformer[-_]engine.*|flash[-_]attn|apex)==' \
        > /opt/image.txt \
    && pip install --constraint configs/install/ngc.txt --constraint /opt/image.txt megatron-core flash-linear-attention \
        tilelang flash-qla flash-attn-4 accelerate gigatoken sentencepiece tokenizers transformers safetensors PyYAML \
        psutil tqdm pyarrow backports.zstd fsspec matplotlib tensorboard
COPY . .
RUN pip install --no-deps . && oryx --version
WORKDIR /work
USER 1000:1000
ENV HOME=/tmp
ENTRYPOINT ["oryx"]
CMD ["--help"]
