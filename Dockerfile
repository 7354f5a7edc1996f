# The engine for CPUs, or with --build-arg DEVICE=cuda for NVIDIA GPUs:
#
#   docker build -t superbert .
#   docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/work" superbert train demo --out runs/demo
#
#   docker build -t superbert:cuda --build-arg DEVICE=cuda .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/work" superbert:cuda \
#       train demo --out runs/demo
#
# The compilers stay in the image: torch.compile and Triton need one when they run.
ARG DEVICE=cpu
ARG PYTHON_IMAGE=python:3.12-slim-bookworm
# Of the CUDA version that the torch of requirements.txt is built for.
ARG CUDA_IMAGE=nvidia/cuda:13.0.1-devel-ubuntu24.04

FROM ${PYTHON_IMAGE} AS base-cpu
ENV SUPERBERT_CUDA=OFF
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

FROM ${CUDA_IMAGE} AS base-cuda
ENV SUPERBERT_CUDA=ON
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3 python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

FROM base-${DEVICE}
# An index with torch's wheels for one device, such as PyTorch's own of CPU builds, which are a tenth
# as large; by default what pip finds, which is built for CUDA and works on CPUs, too.
ARG TORCH_INDEX=
# CMake's targets of the CUDA code, such as 90-real for an H100 alone; by default 8.x, 9.0, 10.0.
ARG SUPERBERT_CUDA_ARCHITECTURES=
RUN python3 -m venv /opt/superbert
ENV PATH=/opt/superbert/bin:$PATH
WORKDIR /opt/source
COPY requirements.txt ./
RUN pip install --no-cache-dir ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt
COPY pyproject.toml setup.py CMakeLists.txt README.md LICENSE ./
COPY engine engine
COPY kernels kernels
COPY csrc csrc
RUN pip install --no-cache-dir --no-build-isolation '.[data]'

# Any user can write into the home, where the cache is: --user takes that of the mounted folder.
RUN useradd --create-home --uid 1001 superbert && chmod 1777 /home/superbert \
    && mkdir /work && chown superbert /work
ENV HOME=/home/superbert
USER superbert
WORKDIR /work
ENTRYPOINT ["superbert"]
CMD ["--help"]
