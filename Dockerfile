# For GPU machines: NVIDIA's PyTorch container brings torch, Transformer Engine and NCCL that were built for each other;
# this adds the rest of requirements.txt around them. It is written from the container's documentation and has not been
# built by its authors yet: after a build, run `bash tests/run_tests.sh` inside.
#   docker build -t llava-megatron --build-arg BASE_IMAGE=<NVIDIA's container nvidia/pytorch, e.g. tag 25.12-py3> .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -it -v <data>:/data llava-megatron
ARG BASE_IMAGE
FROM ${BASE_IMAGE}

WORKDIR /workspace/llava-megatron
COPY requirements.txt .
# The container's own PIP_CONSTRAINT pins unrelated packages; ours keeps its torch, numpy and Transformer Engine in place.
RUN pip list --format=freeze > /tmp/installed.txt \
    && grep -iE '^(torch|numpy|transformer.engine)==' /tmp/installed.txt > /tmp/constraints.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt pip install --no-cache-dir -r requirements.txt \
    && useradd --create-home --shell /bin/bash llava \
    && chown llava:llava .
COPY --chown=llava:llava . .
USER llava
# Launchers and tests take this interpreter instead of making .venv.
ENV PYTHON=/usr/bin/python
