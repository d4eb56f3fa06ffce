# oryx_megatron on NVIDIA's PyTorch image, whose torch, TransformerEngine, flash-attn and apex stay as they are:
#   docker build --file docker/ngc.Dockerfile --tag oryx-ngc .
#   docker run --gpus all --ipc=host --user "$(id -u):$(id -g)" --volume "$PWD:/work" oryx-ngc doctor
FROM nvcr.io/nvidia/pytorch:26.02-py3
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/source
COPY configs/install/ngc.txt configs/install/
# --no-deps where a package asks for a torch of its own choice; the image's constraints (PIP_CONSTRAINT) name other versions.
RUN unset PIP_CONSTRAINT \
    && pip install --constraint configs/install/ngc.txt --no-deps megatron-core flash-linear-attention fla-core flash-qla \
        flash-attn-4 accelerate gigatoken \
    && pip install --constraint configs/install/ngc.txt tilelang sentencepiece tokenizers transformers safetensors PyYAML \
        psutil tqdm pyarrow backports.zstd fsspec matplotlib tensorboard
COPY . .
RUN pip install --no-deps . && oryx --version
WORKDIR /work
USER 1000:1000
ENV HOME=/tmp
ENTRYPOINT ["oryx"]
CMD ["--help"]
